"""The model: its published shape, and that nothing leaks from later to earlier positions."""

import math

import pytest
import torch
import torch.nn.functional as F

# Issue 2's table, written out: name and shape of everything a file of weights holds.
CONV = [("conv1", 3, 16), ("conv2", 16, 32), ("conv3", 32, 64)]
BLOCK = {
    "ln1.weight": (128,),
    "ln1.bias": (128,),
    "attn.qkv.weight": (384, 128),
    "attn.proj.weight": (128, 128),
    "ln2.weight": (128,),
    "ln2.bias": (128,),
    "mlp.fc1.weight": (256, 128),
    "mlp.fc1.bias": (256,),
    "mlp.fc2.weight": (128, 256),
    "mlp.fc2.bias": (128,),
}
FORMAT = {
    "vis_enc.proj.weight": (128, 64),
    "vis_enc.proj.bias": (128,),
    "tok_emb.weight": (2048, 128),
    "pos_emb.weight": (64, 128),
    "ln_f.weight": (128,),
    "ln_f.bias": (128,),
    "lm_head.weight": (2048, 128),
}
for name, channels_in, channels_out in CONV:
    FORMAT[f"vis_enc.{name}.0.weight"] = (channels_out, channels_in, 3, 3)
    FORMAT[f"vis_enc.{name}.0.bias"] = (channels_out,)
    for part in ("weight", "bias", "running_mean", "running_var"):
        FORMAT[f"vis_enc.{name}.1.{part}"] = (channels_out,)
    FORMAT[f"vis_enc.{name}.1.num_batches_tracked"] = ()
for n in range(3):
    FORMAT |= {f"blocks.{n}.{key}": shape for key, shape in BLOCK.items()}


@pytest.fixture(scope="module")
def model(nb):
    """The model in its published shape, in eval mode."""
    torch.manual_seed(0)
    return nb.MiniVLM(nb.Config()).eval()


@pytest.fixture(scope="module")
def pictures(nb):
    """Five random pictures, normalised."""
    generator = torch.Generator().manual_seed(1)
    return nb.normalise(torch.randint(0, 256, (5, 3, 112, 112), generator=generator))


def randint(low, high, size):
    return torch.randint(low, high, size, generator=torch.Generator().manual_seed(2))


# The published shape


def test_state_dict_is_the_published_format(model):
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == FORMAT


def test_parameter_counts(nb, model):
    distinct = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert sum(distinct.values()) == 698_624
    buffers = {name for name, _ in model.named_buffers()}
    every = [v.numel() for k, v in model.state_dict(keep_vars=True).items() if k not in buffers]
    assert sum(every) == 960_768  # lm_head.weight and tok_emb.weight both
    parts = nb.count_parameters(model)
    assert parts.total() == 698_624
    assert parts["tok_emb"] == 262_144
    assert parts["lm_head"] == 0


def test_defaults_are_the_published_numbers(nb):
    assert nb.Config().model_dict() == {
        "D_MODEL": 128, "N_HEADS": 4, "N_LAYERS": 3, "D_FF": 256, "VIS_CH": 64, "N_VIS": 16,
        "VOCAB_SIZE": 2048, "MAX_SEQ": 48, "IMG_SIZE": 112, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    assert nb.PAD == 0


def test_layers_are_the_published_ones(model):
    for name, *_ in CONV:
        conv, norm, relu = getattr(model.vis_enc, name)
        assert (conv.stride, conv.padding) == ((2, 2), (1, 1))
        assert isinstance(norm, torch.nn.BatchNorm2d)
        assert isinstance(relu, torch.nn.ReLU)
    assert len(model.blocks) == 3
    assert all(block.attn.n_heads == 4 for block in model.blocks)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [1, 20, 48])
def test_logits_have_a_row_for_each_position(model, pictures, B, T):
    with torch.no_grad():
        img_tokens = model.vis_enc(pictures[:B])
        logits = model(img_tokens, randint(0, 2048, (B, T)))
    assert img_tokens.shape == (B, 16, 128)
    assert logits.shape == (B, 16 + T, 2048)
    assert logits.isfinite().all()


def test_a_49th_token_has_no_position(model, pictures):
    with torch.no_grad(), pytest.raises(IndexError):
        model(model.vis_enc(pictures[:1]), randint(0, 2048, (1, 49)))


def test_visual_tokens_run_over_the_grid_row_by_row(model, pictures):
    """Change one corner of the picture: only the tokens of cells near it change."""
    changed = pictures[:1].clone()
    changed[:, :, :20, -20:] = 0  # the top right corner: cell 3
    with torch.no_grad():
        moved = (model.vis_enc(pictures[:1]) - model.vis_enc(changed)).abs().amax(-1)[0]
    assert moved.argmax() == 3
    assert not moved[[0, 1, 4, 8, 12, 13, 14, 15]].any()


def test_normalise_is_imagenets(nb):
    white = nb.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(white[0, :, 0, 0], torch.tensor(expected))


def test_mlp_uses_the_exact_gelu(nb):
    mlp = nb.MLP(nb.Config(D_MODEL=4, D_FF=4)).double()
    for layer in (mlp.fc1, mlp.fc2):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x = torch.linspace(-4, 4, 100, dtype=torch.float64).view(25, 4)
    with torch.no_grad():
        y = mlp(x)
    torch.testing.assert_close(y, 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))
    assert (y - F.gelu(x, approximate="tanh")).abs().max() > 1e-4  # so the test can tell them apart


def test_block_is_pre_norm_with_residuals(nb, model):
    x = torch.randn(2, 6, 128)
    block = model.blocks[0]
    with torch.no_grad():
        middle = x + block.attn(F.layer_norm(x, (128,), block.ln1.weight, block.ln1.bias))
        expected = middle + block.mlp(
            F.layer_norm(middle, (128,), block.ln2.weight, block.ln2.bias)
        )
        torch.testing.assert_close(block(x), expected)


# Attention


@pytest.mark.parametrize("shape", ["causal", "cached", "by_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_attention_equals_plain(nb, shape, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    T, S = (3, 9) if shape == "cached" else (9, 9)
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if shape == "by_row":
        mask = mask & (torch.rand(2, 1, T, S) < 0.5) | torch.eye(9, dtype=torch.bool)
    q = torch.randn(2, 4, T, 32, dtype=dtype, device=device)
    k, v = torch.randn(2, 2, 4, S, 32, dtype=dtype, device=device)
    mask = mask.to(device)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    plain = nb.plain_attention(q, k, v, mask)
    assert plain.dtype == nb.attention(q, k, v, mask).dtype == dtype
    close = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(plain, fused, **close)
    torch.testing.assert_close(nb.attention(q, k, v, mask), fused, **close)


def test_attention_by_a_loop(nb):
    """Against the definition, one head and one query at a time."""
    layer = nb.CausalSelfAttention(nb.Config(D_MODEL=12, N_HEADS=3)).double()
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = (x[0] @ layer.qkv.weight.T).split(12, dim=1)
        rows = []
        for t in range(5):
            heads = []
            for h in range(3):
                part = slice(4 * h, 4 * h + 4)
                shares = torch.stack([q[t, part] @ k[s, part] / 2 for s in range(t + 1)]).softmax(0)
                heads.append(sum(share * v[s, part] for s, share in enumerate(shares)))
            rows.append(torch.cat(heads) @ layer.proj.weight.T)
        torch.testing.assert_close(layer(x)[0], torch.stack(rows))


@pytest.mark.parametrize("position", [0, 1, 7, 15])
def test_attention_does_not_look_ahead(nb, model, position):
    x = torch.randn(2, 16, 128)
    changed = x.clone()
    changed[:, position] += 1
    with torch.no_grad():
        moved = (model.blocks[0].attn(x) - model.blocks[0].attn(changed)).abs().amax((0, 2))
    assert not moved[:position].any()
    assert moved[position:].all()


@pytest.mark.parametrize("position", [0, 5, 15])
def test_a_later_visual_token_changes_no_earlier_logits(model, pictures, position):
    with torch.no_grad():
        img_tokens = model.vis_enc(pictures)
        ids = randint(3, 2048, (5, 10))
        changed = img_tokens.clone()
        changed[:, position] += 1
        moved = (model(img_tokens, ids) - model(changed, ids)).abs().amax((0, 2))
    assert not moved[:position].any()
    assert moved[position:].all()


@pytest.mark.parametrize("position", [0, 4, 47])
def test_a_later_word_changes_no_earlier_logits(model, pictures, position):
    with torch.no_grad():
        img_tokens = model.vis_enc(pictures)
        ids = randint(3, 2048, (5, 48))
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 2048
        moved = (model(img_tokens, ids) - model(img_tokens, changed)).abs().amax((0, 2))
    assert not moved[: 16 + position].any()
    assert moved[16 + position :].all()


def test_gradients_do_not_flow_back_from_the_past(model):
    """What position 20 says depends on inputs 0 to 20, and on no other."""
    x = torch.randn(1, 30, 128, requires_grad=True)
    (model.transform(x)[0, 20] @ torch.randn(128)).backward()
    reached = x.grad[0].abs().amax(-1) > 0
    assert reached.tolist() == [t <= 20 for t in range(30)]


# Packed captions


def packed_losses(nb, model, pictures, groups):
    """The loss of each token, as a list of lists for each picture."""
    packed = nb.pack_captions(groups, model.cfg.N_VIS)
    losses = nb.CaptionLoss(model)(pictures, packed)
    return [
        [losses[row][packed.caption[row] == k] for k in range(len(group))]
        for row, group in enumerate(groups)
    ]


def test_packed_captions_do_not_see_each_other(nb, tiny):
    torch.manual_seed(0)
    model = nb.MiniVLM(tiny).eval()
    picture = torch.randint(0, 256, (1, 3, 16, 16))
    captions = [[1, 5, 6, 7, 2], [1, 8, 9, 2], [1, 10, 11, 12, 13, 2]]
    with torch.no_grad():
        before = packed_losses(nb, model, picture, [captions])[0]
        for changed in range(3):
            other = [list(ids) for ids in captions]
            other[changed][1] = 19
            after = packed_losses(nb, model, picture, [other])[0]
            for k in range(3):
                assert torch.equal(before[k], after[k]) == (k != changed)
        elsewhere = packed_losses(nb, model, 255 - picture, [captions])[0]
        assert all((a != b).all() for a, b in zip(before, elsewhere))  # all see the picture


def test_pack_captions_by_hand(nb):
    packed = nb.pack_captions([[[1, 5, 6, 2], [1, 7, 2]], [[1, 8, 2]]], n_vis=4)
    assert packed.inputs.tolist() == [[1, 5, 6, 1, 7, 0, 0, 0], [1, 8, 0, 0, 0, 0, 0, 0]]
    assert packed.targets.tolist() == [[5, 6, 2, 7, 2, 0, 0, 0], [8, 2, 0, 0, 0, 0, 0, 0]]
    assert packed.positions[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert packed.positions[1, :6].tolist() == [0, 1, 2, 3, 4, 5]
    assert packed.caption.tolist() == [[0, 0, 0, 1, 1, -1, -1, -1], [0, 0] + [-1] * 6]


def test_packed_mask_by_hand(nb):
    mask = nb.packed_mask(torch.tensor([[0, 0, 1, -1]]), n_vis=2)
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],  # a new caption: the picture and itself
        [1, 1, 0, 0, 0, 1],  # padding: something, or softmax would divide by zero
    ]


# How it starts


def test_gpt2_start_is_small_and_leaves_the_encoder_alone(nb):
    cfg = nb.Config(init="gpt2")
    torch.manual_seed(0)
    plain = nb.MiniVLM(cfg)
    torch.manual_seed(0)
    model = nb.init_weights(nb.MiniVLM(cfg), cfg)
    assert model.lm_head.weight is model.tok_emb.weight
    for name, parameter in model.named_parameters():
        if name.startswith("vis_enc"):
            assert torch.equal(parameter, plain.get_parameter(name))
        elif parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith("bias"):
            assert not parameter.any(), name


def test_pytorch_start_is_left_alone(nb):
    cfg = nb.Config(init="pytorch")
    model = nb.MiniVLM(cfg)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nb.init_weights(model, cfg)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_the_right_share_and_keeps_the_mean(nb, p):
    torch.manual_seed(0)
    drop, x = nb.Dropout(p), torch.ones(100_000)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert torch.equal(drop.eval()(x), x)
