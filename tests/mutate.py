"""Do the tests see a mistake? Makes many, one at a time, and counts those that a test fails on.

    python tests/mutate.py [PART OF A MUTATION] [--list]

Not run by pytest. Each mutation replaces text in the component cells of a copy of the notebook; then
the tests of that section run on the copy, until the first failure. Prints those that survive.
"""

# ruff: noqa: E501

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOTEBOOK = Path(os.environ.get("SUPRAVL_NOTEBOOK") or HERE.parent / "SupraVL_Nano.ipynb")
SECONDS = 400  # a run that takes longer hangs: that is noticed, too

MUTATIONS = {
    "test_model": [
        ('"N_LAYERS": 100, ', ""),
        ("self.D_MODEL % self.N_HEADS", "self.D_MODEL < self.N_HEADS"),
        ("type(value) not in (int, type(field.default))", "not isinstance(value, (int, float))"),
        ("not 0 <= value < 2**32", "not 0 <= value"),
        ("is_bf16_supported(including_emulation=False)", "is_bf16_supported()"),
        ("stride=2, padding=1", "stride=2, padding=0"),
        ("nn.BatchNorm2d(channels_out), nn.ReLU())", "nn.BatchNorm2d(channels_out))"),
        ("x = x.flatten(2).transpose(1, 2)", "x = x.transpose(2, 3).flatten(2).transpose(1, 2)"),
        ("[0.229, 0.224, 0.225]", "[0.229, 0.224, 0.229]"),
        ("    if images.shape[1] == 3:", "    if False:"),
        (".tril(S - Q)", ".tril()"),
        ("/ math.sqrt(q.shape[-1])", "/ math.sqrt(k.shape[-2])"),
        ("scores.masked_fill(~mask", "scores.masked_fill(mask"),
        ("F.gelu(self.fc1(x))", 'F.gelu(self.fc1(x), approximate="tanh")'),
        ("x = x + self.attn(self.ln1(x), cache, mask)", "x = self.attn(self.ln1(x), cache, mask)"),
        ("x + self.mlp(self.ln2(x))", "self.ln2(x + self.mlp(x))"),
        ("self.attn(self.ln1(x), cache, mask)", "self.attn(self.ln1(x), cache)"),
        ("self.lm_head.weight = self.tok_emb.weight", "pass"),
        ("self.pos_emb.weight[past : past", "self.pos_emb.weight[0 : 0"),
        ("std=0.02", "std=0.2"),
        ("return self.ln_f(x)", "return x"),
        ("torch.cat([img_tokens, x.to(img_tokens.dtype)], dim=1)",
         "torch.cat([x.to(img_tokens.dtype), img_tokens], dim=1)"),
    ],
    "test_data": [
        ("formats=FORMATS", "formats=None"),
        ("image.width * image.height > Image.MAX_IMAGE_PIXELS or ", ""),
        ("ImageOps.exif_transpose(image)", "image"),
        (' or image.mode[0] in "IF":', ":"),
        ("not Path(source).is_file()", "not Path(source).exists()"),
        ('"RGBA", image.size, "white"', '"RGBA", image.size, "black"'),
        ('encoding="utf-8-sig"', 'encoding="utf-8"'),
        ("strict=True", "strict=False"),
        ('re.sub(r"#\\d+$", "", name.strip())', "name.strip()"),
        ('.strip()) > 1:', '.strip()) > 0:'),
        ("items() if n > 1]", "items() if n > 9]"),
        ("sorted(names, key=fingerprint)", "sorted(names)"),
        ("os.fsync(file.fileno())", "pass"),
        ("[images[: len(names)].clone(), names]", "[images[: len(names)].flip(0), names]"),
        ("mmap=True, weights_only=True)", "weights_only=False)"),
        ("(s := f.stat()).st_size, s.st_mtime_ns", "0"),
        ("repr((size, stats))", "repr(stats)"),
        ('r"\\.part/|__MACOSX"', 'r"__MACOSX"'),
        ("[captions[name] for name in names]", "[captions[name] for name in wanted[: len(names)]]"),
        ("len(lost) > len(wanted) / 10", "len(lost) > len(wanted) / 2"),
        ("archive.infolist()) < 2e9", "archive.infolist()) < 4e9"),
        ("if not 0 < sum(", "if not 0 <= sum("),
        ("shutil.rmtree(part, ignore_errors=True)", "pass"),
        ("        file.unlink()\n        part.rename", "        part.rename"),
        ("zipfile.zlib.error, RuntimeError)", "zipfile.zlib.error)"),
        ('splits["test"].names)), "own"), splits', 'splits["test"].names)), "flickr8k"), splits'),
        ('lists = fetch(home / "flickr8k", ["Flickr8k_text"]) / "Flickr8k_text"', "lists = None"),
        ("fontsize=9, parse_math=False)", "fontsize=9)"),
    ],
    "test_tokenizer": [
        ("tokenizer.encode_special_tokens = True  # cuts", "pass  # cuts"),
        ("[[BOS, *found.ids, EOS] for", "[[BOS, *found.ids] for"),
        ("normalizers.Lowercase()", "normalizers.NFKC()"),
        (', "initial_alphabet": alphabet', ""),
        ("step = 2 if tuple", "step = 1 if tuple"),
        ("pairs[pair] += counts[word]", "pairs[pair] += 1"),
    ],
    "test_training": [
        ("augment(images[i])", "images[i]"),
        ("for i, (own, _) in enumerate(both) for caption in own]", "for i, (own, _) in enumerate(both) for caption in own[:1]]"),
        ("split.images, strict=True)", "split.images)"),
        ("        ids = ids[:, : self.model.cfg.MAX_SEQ + 1]  # cuts", "        ids = ids[:, : self.model.cfg.MAX_SEQ]  # cuts"),
        ("batch.ids[:, 1 : model.cfg.MAX_SEQ + 1]", "batch.ids[:, 1:]"),
        ("length = 1 + 8 * math.ceil((max(map(len, rows)) - 1) / 8)", "length = max(map(len, rows))"),
        ("DistributedSampler(pairs, world, rank, seed=recipe.seed)", "DistributedSampler(pairs, world, rank)"),
        ("DistributedSampler(pairs, world, rank, seed", "DistributedSampler(pairs, 1, 0, seed"),
        ("recipe.batch_size // world", "recipe.batch_size"),
        ("v2.RandomHorizontalFlip(recipe.flip)", "v2.RandomHorizontalFlip(0.5)"),
        ("asked = ids[:, 1:] != PAD", "asked = ids[:, 1:] == ids[:, 1:]"),
        ("self.model.text_logits(img_tokens, ids[:, :-1], where", "self.model.text_logits(img_tokens.flip(0), ids[:, :-1], where"),
        ("total // 4", "total"),
        ("recipe.lr * (step + 1) / warmup", "recipe.lr * step / warmup"),
        ("progress = (step - warmup)", "progress = (step + 1 - warmup)"),
        ("learning_rate(step, steps, recipe)", "learning_rate(max(0, step - 1), steps, recipe)"),
        ('"optimizer": optimizer, "scaler": scaler}', '"optimizer": optimizer}'),
        ('{"loss": loss_of, "optimizer": optimizer, "scaler"', '{"loss": loss_of, "scaler"'),
        ("            scaler.unscale_(optimizer)", "            pass"),
        ("nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "pass"),
        ("            scaler.update()\n", ""),
        ("            optimizer.zero_grad()\n", ""),
        ("torch.manual_seed(recipe.seed + 1000 * epoch)  #", "pass  #"),
        ("loader.sampler.set_epoch(epoch)", "pass"),
        ("        loss_of.train()\n", ""),
        ("return model.eval(), history", "return model.train(), history"),
        ("if not math.isfinite(row", "if math.isnan(row"),
        ("zipfile.ZipFile(path).testzip()", "False"),
        ("weights_only=True)\n        for name, part", "weights_only=False)\n        for name, part"),
        ('.partition(". ")[0]', ""),
        ("        save_checkpoint(path, parts, [])", "        pass"),
        ("repr(made_from)", "repr(made_from[:1])"),
        ("total += tokens * loss_of", "total += loss_of"),
        ("CaptionLoss(model.eval())", "CaptionLoss(model)"),
        ("betas=(0.9, 0.95), fused=", "fused="),
        ("(-3, 2**24), (-1, 2**30)", "(-3, 2**25), (-1, 2**30)"),
        ('if sys.platform == "linux":  # glibc', "if True:  # glibc"),
    ],
    "test_decoding": [
        ("(logits / temperature)", "logits"),
        ("new.masked_fill(done, PAD)[:, None]", "new[:, None]"),
        ("logits.topk(min(top_k, logits.shape[1]))", "logits.topk(logits.shape[1])"),
        ("shares.multinomial(1, generator=generator)", "shares.multinomial(1)"),
        ("gains[done] = -math.inf", "pass"),
        ("tokens[done, 0] = 0.0, PAD", "tokens[done, 0] = 1.0, PAD"),
        ("tokens[done, 0] = 0.0, PAD", "tokens[done, 1] = 0.0, PAD"),
        ("parent, tokens = flat // beam_width", "parent, tokens = flat % beam_width"),
        ("img_tokens = img_tokens[rows]", "img_tokens = img_tokens[: len(rows)]"),
        ("            cache[:] = [x.index_select(0, rows) for x in cache]", "            pass"),
        ("done = done[row, parent] |", "done ="),
        (" ** length_penalty).argmax(1)", " ** 0).argmax(1)"),
        ("(scores / (ids[:, :, 1:] != PAD)", "(scores / (ids[:, :, 1:] != EOS)"),
        ("go = ~done.all(1) &", "go = ~done.any(1) &"),
        ("rows = (row * beams + parent)[go]", "rows = (row * beams)[go].expand(-1, beam_width)"),
        ("beam[0] / len(beam[1]) ** length_penalty", "beam[0]"),
        (".split(64) if len(img) else ()", ".split(64)"),
        ("reverse=True)[:beam_width]", "reverse=True)[: beam_width + 1]"),
        ("model.eval().vis_enc(some)", "model.vis_enc(some)"),
        ("    model.train(training)", "    pass"),
        (".split(64)", ".split(640)"),
        ("img.shape[1:] == (3, size, size)", "img.dim() == 4"),
        ("img.is_floating_point() and ", ""),
        ("not (img.abs() < 10).all()", "(img.abs() > 10).any()"),
        ("type(max_new) is not int or max_new < 1:", "max_new < 0:"),
        ("not 0 <= length_penalty < math.inf", "length_penalty < 0"),
        ("not 0 < temperature < math.inf", "temperature <= 0"),
        ("type(beam_width) is int and ", ""),
        ("make_transform(self.cfg.IMG_SIZE)(open_picture", "transform(open_picture"),
    ],
    "test_save": [
        ('    (folder / "config.json").unlink(missing_ok=True)', "    pass"),
        (' or ("running_var" in key and x.min() < 0)', ""),
        ("x.isfinite().all() and ", ""),
        (" and x.is_floating_point() == like.get(key, x).is_floating_point()", ""),
        ("assign=True)", "assign=True, strict=False)"),
        ('items() if "attn.mask" not in k}', "items()}"),
        ("model.to(device, torch.float32).eval()", "model.to(device).eval()"),
        ('    with torch.device("meta"):  #', "    if True:  #"),
        ('if not weights.setdefault("lm_head.weight", embedding).equal(embedding)', 'weights["lm_head.weight"] = embedding\n    if False'),
        ('if values.get("variant") != cls.variant:', "if False:"),
        (' | ({"variant": self.variant} if self.variant else {})', ""),
        ("special != [PAD, BOS, EOS] or ", ""),
        ("tokenizer.get_vocab_size() > cfg.VOCAB_SIZE", "False"),
        ("model.to(device, torch.float32).eval()", "model.to(device, torch.float32)"),
        ("revision=revision, allow_patterns=files", "allow_patterns=files"),
        ("exist_ok=True)\n        return HfApi", "exist_ok=False)\n        return HfApi"),
    ],
    "test_scst": [
        ("24, temperature, top_k=None)", "24, top_k=None)"),
        ("numbers.repeat_interleave(per_image).tolist()", "numbers.repeat(per_image).tolist()"),
        ("/ (scores.shape[1] - 1)", "/ scores.shape[1]"),
        (".clamp(min=0.01)", ""),
        ("self.human = CiderD(captions), temperature, human", "self.human = CiderD(captions), 0.5, human"),
        ("self.cider, 5, self.temperature", "self.cider, 5, 0.5"),
        ("logits[: asked[: len(own)].sum()] /= self.temperature", "pass"),
        (".repeat_interleave(asked.sum(1))).mean()", ".repeat_interleave(asked.sum(1))).sum() / len(rows)"),
        ("where=asked).float()\n        logits[", "where=asked).float()\n        logits[1:]["),
        ("gains.new_full((len(ids),), self.human)", "gains.new_full((len(ids),), 0.6)"),
        ("return super().train(False)", "return super().train(mode)"),
        ("repeat_interleave(scores.shape[1], 0), visual])", "repeat_interleave(scores.shape[1], 0), visual.flip(0)])"),
        ("numbers, self.cider", "numbers * 0, self.cider"),
        ("lr=recipe.scst_lr, ", ""),
        ("batch_size=200)", "batch_size=20)"),
        ("warmup=20", "warmup=0"),
        ("copy.deepcopy(model), split", "model, split"),
        ("make_loader(split, model.tokenizer, how, world", "make_loader(split, model.tokenizer, replace(how, flip=0), world"),
        (", world=5)", ")"),
        ("loader, how, *more)", "loader, how, *more[:2])"),
    ],
}  # fmt: skip


def mutants():
    """(tests, old, new, the notebook with it as text)."""
    original = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for tests, pairs in MUTATIONS.items():
        for old, new in pairs:
            notebook, found = json.loads(json.dumps(original)), 0
            for cell in notebook["cells"]:
                source = "".join(cell["source"])
                if "component" in cell["metadata"].get("tags", []) and old in source:
                    if not found:
                        cell["source"] = source.replace(old, new)
                    found += 1
            yield tests, old, new, json.dumps(notebook) if found else None


def run(tests, text):
    """Whether the tests pass on a notebook, in a fork: what is imported is imported once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.ipynb"
        path.write_text(text, encoding="utf-8")
        child = os.fork()
        if not child:
            os.setsid()
            os.environ["SUPRAVL_NOTEBOOK"] = str(path)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1), os.dup2(nowhere, 2)
            os.chdir(HERE.parent)
            how = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", f"{folder}/t"]
            os._exit(pytest.main([*how, f"tests/{tests}.py"]))
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status == 0
            time.sleep(0.1)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "agg")
    import huggingface_hub  # noqa: F401
    import IPython.display  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pytest
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401

    wanted = [word for word in sys.argv[1:] if word != "--list"]
    killed, survivors, absent, sound = 0, [], 0, set()
    for tests, old, new, text in mutants():
        name = f"{tests}: {old[:60]!r} -> {new[:40]!r}"
        if wanted and not any(word in name for word in wanted):
            continue
        if text is None:
            absent += 1
            print("NOT THERE", name, flush=True)
        elif "--list" not in sys.argv:
            if tests not in sound:  # else every mutation would seem to be noticed
                assert run(tests, NOTEBOOK.read_text(encoding="utf-8")), f"{tests} fails as it is"
                sound.add(tests)
            start, survives = time.monotonic(), run(tests, text)
            killed += not survives
            survivors += [name] if survives else []
            seconds = f"{time.monotonic() - start:4.0f} s"
            print("SURVIVES" if survives else "killed  ", seconds, name, flush=True)
    print(
        f"{killed} of {killed + len(survivors)} killed; {absent} are about code that is not there"
    )
    for name in survivors:
        print("  survives:", name)
