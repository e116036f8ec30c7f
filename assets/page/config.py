"""Run the notebook and write it with its outputs as a page, by nbconvert; progress meanwhile.

jupyter nbconvert --config assets/page/config.py SupraVL_Nano.ipynb
"""

import re
import sys
import time
from pathlib import Path

from nbconvert.preprocessors import CoalesceStreamsPreprocessor, ExecutePreprocessor


class Run(ExecutePreprocessor):
    """Runs the cells, says which section is at work, and at the end what came out."""

    section, start, shown = "", time.monotonic(), 0.0

    def preprocess_cell(self, cell, resources, index):
        if cell.cell_type == "markdown" and (heading := re.match("##? (.*)", cell.source)):
            self.section = heading[1]
            self.say("", "\n")
        cell.metadata.section = self.section
        return super().preprocess_cell(cell, resources, index)

    def process_message(self, msg, cell, cell_index):
        text = msg["content"].get("text", "").split("\r")[-1].strip()  # also of a progress bar
        if text and sys.stdout.isatty() and time.monotonic() > self.shown + 0.3:
            self.say(text.splitlines()[-1], "\r")
        return super().process_message(msg, cell, cell_index)

    def say(self, text, end):
        """One line; "\r" leaves the cursor on it, so that the next one takes its place."""
        self.shown = time.monotonic()
        minutes, seconds = divmod(int(self.shown - self.start), 60)
        clear = "\r\033[K" if sys.stdout.isatty() else ""
        print(f"{clear}{minutes}:{seconds:02}  {self.section}  {text}"[:79], end=end, flush=True)

    def preprocess(self, nb, resources=None, km=None):
        nb, resources = super().preprocess(nb, resources, km)
        CoalesceStreamsPreprocessor().preprocess(nb, resources)  # of a progress bar only the end
        for cell in (cell for cell in nb.cells if cell.cell_type == "code"):
            cell.outputs = [o for o in cell.outputs if o.get("text", "-").strip()]
        said = "".join(o.get("text", "") for c in nb.cells for o in c.get("outputs", []))
        pairs = re.findall(r"^(person .*)\n(?:\w+ .*\n)*?(beam .*)", said, re.M)[:4]
        folder = Path(resources["metadata"]["path"] or ".").resolve()
        print("\r\033[K" if sys.stdout.isatty() else "", end="")
        print("\nTest pictures, in a person's words and in the model's:")
        print(*(f"  {person}\n  {model}" for person, model in pairs), sep="\n")
        print(f"\nThe model:               {folder / 'supravl-nano'}")
        print(f"The page, for a browser: {folder / resources['unique_key']}.html", flush=True)
        return nb, resources


c = get_config()  # noqa: F821  nbconvert defines it
c.NbConvertApp.export_format = "html"
c.NbConvertApp.log_level = "WARN"
c.HTMLExporter.preprocessors = [Run]
c.HTMLExporter.extra_template_basedirs = [str(Path(__file__).resolve().parents[1])]
c.HTMLExporter.template_name = "page"
c.HTMLExporter.embed_images = True
c.HTMLExporter.exclude_input_prompt = c.HTMLExporter.exclude_output_prompt = True
c.Run.extra_arguments = ["--log-level=ERROR"]  # the kernel's
