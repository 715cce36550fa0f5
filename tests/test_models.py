import pytest
import torch
import torch.nn.functional as F
from diffusers import PyramidAttentionBroadcastConfig, WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig
from torch import nn

from stableavatar.config import SIZES
from stableavatar.models.attention import ContextCache, CrossAttention, KernelProcessor, KeyValue
from stableavatar.models.audio_adapter import slot_bounds, slot_indices
from stableavatar.models.rope import rotary_table, rotate
from stableavatar.models.transformer import StableAvatarTransformer3DModel, timestep_features
from toy import toy_transformer

FRAMES, HEIGHT, WIDTH = 3, 4, 6


def inputs(batch: int = 1, speech_rows: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": draw(batch, 16, FRAMES, HEIGHT, WIDTH),
        "condition": draw(batch, 20, FRAMES, HEIGHT, WIDTH),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "encoder_hidden_states": draw(batch, 48, 16),
        "encoder_hidden_states_image": draw(batch, 5, 32),
        "speech_features": draw(speech_rows, 20, 24),
    }


@pytest.fixture(scope="module")
def model() -> StableAvatarTransformer3DModel:
    return toy_transformer()


@torch.no_grad()
def run(model: StableAvatarTransformer3DModel, **arguments: object) -> torch.Tensor:
    return model(**arguments).sample


def test_without_audio_it_is_the_wan_transformer_of_diffusers() -> None:
    model = toy_transformer()
    state = {name: tensor for name, tensor in model.state_dict().items() if "vocal" not in name}
    with torch.no_grad():
        for block in model.blocks:  # audio keys and values start at zero, and then add nothing
            for projection in (block.attn2.k_vocal, block.attn2.v_vocal):
                projection.weight.zero_()
                projection.bias.zero_()
    reference = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=36,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        image_dim=32,
        added_kv_proj_dim=32,
    ).eval()
    reference.load_state_dict(state)
    x = inputs(batch=2)
    with torch.no_grad():
        theirs = reference(
            torch.cat([x["hidden_states"], x["condition"]], dim=1),
            x["timestep"],
            # diffusers splits the portrait off at 512 prompt tokens
            torch.nn.functional.pad(x["encoder_hidden_states"], (0, 0, 0, 512 - 48)),
            x["encoder_hidden_states_image"],
            return_dict=False,
        )[0]
    x["encoder_hidden_states"] = torch.nn.functional.pad(x["encoder_hidden_states"], (0, 0, 0, 512 - 48))
    ours = run(model, **x, audio_rows=[0, 0])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_slots_of_the_published_example() -> None:
    # 134 features for 81 frames: r = 1.654, half = 3, n = 2·3 + 9
    bounds = slot_bounds(134, 21)
    assert len(bounds) == 21
    assert {last - first + 1 for first, last in bounds} == {15}
    centre = int((134 / 81 * 1 + 134 / 81 * 5) / 2) - 1
    assert bounds[1] == (centre - 3 - 4, centre + 3 + 4)
    start = centre - 3
    assert bounds[0] == (-(2 * 3 - start) - 4, start + 4)


def test_tokens_outside_the_speech_are_zeros_after_the_valid_ones() -> None:
    index = slot_indices(134, 21)
    assert index.shape == (21, 15)
    for row in index.tolist():
        valid = [i for i in row if i < 134]
        assert row == valid + [134] * (len(row) - len(valid))
        assert valid == list(range(valid[0], valid[-1] + 1))
    assert (index[0] == 134).any()
    assert (index[-1] == 134).any()
    assert not (index[5] == 134).any()


def test_a_frame_hears_its_own_slot_only_unless_the_clip_is_heard(
    model: StableAvatarTransformer3DModel,
) -> None:
    frames = 7
    adapter, table = model.vocal_projector, slot_indices(40, frames)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(1, 40, 24, generator=generator)
    video = torch.randn(1, frames, 6, 32, generator=generator)
    e0, e = torch.randn(1, 6, 32, generator=generator), torch.randn(1, 32, generator=generator)
    changed = features.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        difference = (adapter(features, video, e0, e) - adapter(changed, video, e0, e)).abs().amax((0, 2, 3))
    hears = torch.tensor([39 in row for row in table.tolist()])
    assert hears.any()
    assert not hears.all()
    assert (difference[hears] > 1e-4).all()
    assert (difference[~hears] == 0).all()


def test_the_adapter_sees_the_timestep_and_the_noisy_video(model: StableAvatarTransformer3DModel) -> None:
    seen: list[torch.Tensor] = []
    hook = model.vocal_projector.register_forward_hook(lambda _m, _i, out: seen.append(out))
    x = inputs()
    run(model, **x)
    run(model, **{**x, "timestep": x["timestep"] * 0.5})
    run(model, **{**x, "hidden_states": x["hidden_states"] + 1})
    hook.remove()
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)
    assert not torch.allclose(seen[0], seen[2], atol=1e-4)


def test_rows_of_a_batch_equal_single_calls(model: StableAvatarTransformer3DModel) -> None:
    x = inputs(batch=3, speech_rows=2)
    batch = run(model, **x, audio_rows=[None, 0, 1])
    for row, speech in enumerate((None, 0, 1)):
        one = {name: value[row : row + 1] for name, value in x.items() if name != "speech_features"}
        features = None if speech is None else x["speech_features"][speech : speech + 1]
        single = run(model, **one, speech_features=features)
        torch.testing.assert_close(batch[row : row + 1], single, atol=1e-5, rtol=0)


def test_no_audio_is_zeros_after_the_adapter_not_no_attention(model: StableAvatarTransformer3DModel) -> None:
    x = inputs()
    quiet = run(model, **x, audio_rows=[None])
    assert not torch.allclose(quiet, run(model, **x), atol=1e-4)
    biased = toy_transformer()
    with torch.no_grad():
        biased.blocks[0].attn2.v_vocal.bias += 1
    assert not torch.allclose(quiet, run(biased, **x, audio_rows=[None]), atol=1e-4)


def test_what_is_kept_changes_nothing_and_is_made_once(
    model: StableAvatarTransformer3DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of prompts and portrait, for all steps and windows."""
    made: list[str] = []
    for name in ("context_key_value", "portrait_key_value"):
        original = getattr(CrossAttention, name)

        def count(self: CrossAttention, x: torch.Tensor, name: str = name, original=original) -> KeyValue:
            made.append(name)
            return original(self, x)

        monkeypatch.setattr(CrossAttention, name, count)
    first, second = inputs(batch=2, seed=1), inputs(batch=2, seed=2)
    prompts, portrait = first["encoder_hidden_states"], first["encoder_hidden_states_image"]
    second |= {"encoder_hidden_states": prompts, "encoder_hidden_states_image": portrait}
    cache = ContextCache()
    for x in (first, second):
        expected = run(model, **x, audio_rows=[0, None])
        made.clear()
        torch.testing.assert_close(
            run(model, **x, audio_rows=[0, None], context_cache=cache), expected, rtol=0, atol=0
        )
    adapter = len(model.vocal_projector.blocks)
    assert made == ["context_key_value"] * adapter  # of the video's tokens, which change
    assert len(cache.tables) == 1


def test_rows_read_their_prompt(model: StableAvatarTransformer3DModel) -> None:
    x = inputs(batch=3)
    prompts = x["encoder_hidden_states"][:2]
    expected = run(model, **{**x, "encoder_hidden_states": prompts[[1, 0, 1]]}, audio_rows=[0, 0, None])
    for cache in (None, ContextCache()):
        ours = run(
            model, **{**x, "encoder_hidden_states": prompts}, audio_rows=[0, 0, None],
            prompt_rows=[1, 0, 1], context_cache=cache,
        )  # fmt: skip
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    for rows in (None, [0, 1], [0, 1, 2]):
        with pytest.raises(ValueError, match="prompt_rows"):
            run(model, **{**x, "encoder_hidden_states": prompts}, audio_rows=[0, 0, None], prompt_rows=rows)


def test_what_is_kept_of_another_portrait_is_refused(model: StableAvatarTransformer3DModel) -> None:
    x, cache = inputs(), ContextCache()
    run(model, **x, context_cache=cache)
    with pytest.raises(ValueError, match="another prompt or portrait"):
        run(
            model,
            **{**x, "encoder_hidden_states_image": x["encoder_hidden_states_image"] + 1},
            context_cache=cache,
        )
    with pytest.raises(ValueError, match="no_grad"):
        model(**x, context_cache=ContextCache())


def test_clip_level_audio_lets_all_frames_hear_everything(model: StableAvatarTransformer3DModel) -> None:
    x = inputs()
    assert not torch.allclose(run(model, **x), run(model, **x, clip_level_audio=True), atol=1e-4)


def test_padding_takes_part_and_is_dropped(model: StableAvatarTransformer3DModel) -> None:
    x = inputs()
    padded = run(model, **x, padded_latent_frames=FRAMES + 2)
    plain = run(model, **x)
    assert padded.shape == plain.shape
    assert not torch.allclose(padded, plain, atol=1e-4)
    torch.testing.assert_close(run(model, **x, padded_latent_frames=FRAMES), plain)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = toy_transformer()
        if checkpointing:
            model.enable_gradient_checkpointing()
        passes: list[nn.Module] = []
        blocks = [*model.blocks, *model.vocal_projector.blocks]
        for block in blocks:
            block.register_forward_pre_hook(lambda block, *_, passes=passes: passes.append(block))
        model(**inputs()).sample.square().mean().backward()
        assert len(passes) == len(blocks) * (1 + checkpointing)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 or name.endswith(("to_k.bias", "add_k_proj.bias", "k_vocal.bias")), (
            name
        )
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_every_kernel_that_runs_here_gives_the_same() -> None:
    model, x = toy_transformer(), inputs()
    expected = run(model, **x)
    for backend in ("_native_math", "native"):
        model.set_attention_backend(backend)
        torch.testing.assert_close(run(model, **x), expected, atol=1e-5, rtol=0)


def test_bfloat16_stays_near(tmp_path: object) -> None:
    model, x = toy_transformer(), inputs()
    expected = run(model, **x)
    model.save_pretrained(tmp_path)
    half = StableAvatarTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.condition_embedder.time_proj.weight.dtype == torch.float32  # spec 1: time in float32
    assert half.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    timestep = x.pop("timestep")
    out = run(half, **{name: value.bfloat16() for name, value in x.items()}, timestep=timestep)
    error = (out.float() - expected).square().mean() / expected.square().mean()
    assert error < 1e-3


def test_lora_of_peft_fits() -> None:
    model, x = toy_transformer(), inputs()
    before = run(model, **x)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "k_vocal"], init_lora_weights=False))
    assert not torch.allclose(run(model, **x), before, atol=1e-4)
    model.disable_adapters()
    torch.testing.assert_close(run(model, **x), before)


def test_rotation_of_a_pair_depends_on_the_distance_alone() -> None:
    table = rotary_table(4, 3, 5, 32)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 32, generator=generator)
    turned_q, turned_k = (rotate(x.expand(1, 60, 1, 32), table)[0, :, 0] for x in (query, key))
    product = turned_q @ turned_k.T  # token (f, h, w) has index f·15 + h·5 + w
    torch.testing.assert_close(product[0, 15 + 5 + 1], product[30, 45 + 5 + 1], atol=1e-4, rtol=0)
    assert abs(product[0, 15] - product[0, 30]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_rotates_to_the_same_numbers(dtype: torch.dtype) -> None:
    """Compiled code and eager code each have a form that is fast there."""
    table = rotary_table(4, 3, 5, 32)
    x = torch.randn(2, 60, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for function in (rotate, torch.compile(rotate, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        turned = function(leaf, table)
        turned.float().square().sum().backward()
        found.append((turned.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def test_tokens_after_the_grid_are_not_rotated() -> None:
    table = rotary_table(1, 2, 2, 16, padded_tokens=6)
    x = torch.randn(1, 6, 1, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x, table)[:, 4:], x[:, 4:])


def test_time_frequencies() -> None:
    features = timestep_features(torch.tensor([500.0]), 256)
    assert features.shape == (1, 256)
    angle = torch.tensor(500 * 10000 ** (-3 / 128), dtype=torch.float64)
    assert features[0, 3] == angle.cos().float()
    assert features[0, 128 + 3] == angle.sin().float()


@pytest.mark.parametrize("rows", [[0], [0, 1], [0, 2, None]])
def test_rows_that_do_not_fit_are_refused(
    model: StableAvatarTransformer3DModel, rows: list[int | None]
) -> None:
    with pytest.raises(ValueError, match="audio_rows"):
        run(model, **inputs(batch=3), audio_rows=rows)


def test_latents_that_do_not_divide_are_refused(model: StableAvatarTransformer3DModel) -> None:
    x = inputs()
    with pytest.raises(ValueError, match="3x4x5"):
        run(
            model, **{**x, "hidden_states": x["hidden_states"][..., :5], "condition": x["condition"][..., :5]}
        )


def test_diffusers_caches_are_not_there(model: StableAvatarTransformer3DModel) -> None:
    """What they keep lies on the model: windows, whose steps come in turn, would get each other's."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    with pytest.raises(AttributeError, match="enable_cache"):
        model.enable_cache(config)


def test_the_defaults_are_the_published_model() -> None:
    with torch.device("meta"):
        model = StableAvatarTransformer3DModel()
    assert len(model.state_dict()) == 1143
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.8e9, rel=0.2)


def test_wide_heads_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the published adapters are wider than the kernels that one may choose can be."""

    def narrow(query: torch.Tensor, **rest: object) -> torch.Tensor:
        raise ValueError(f"heads of {query.shape[-1]}")

    backends = _AttentionBackendRegistry._backends
    monkeypatch.setitem(backends, AttentionBackendName.SAGE, narrow)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, AttentionBackendName.SAGE, {"query"})
    processor = KernelProcessor()
    processor._attention_backend = AttentionBackendName.SAGE
    with pytest.raises(ValueError, match="heads of 128"):
        processor(*torch.randn(3, 1, 4, 8, 128))
    for sizes in SIZES.values():
        config = sizes.transformer
        whole = config["audio_hidden_dim"] or config["num_attention_heads"] * config["attention_head_dim"]
        width = whole // config["audio_heads"]
        query, key, value = torch.randn(3, 1, 4, 2, width)
        expected = F.scaled_dot_product_attention(*(it.transpose(1, 2) for it in (query, key, value)))
        torch.testing.assert_close(processor(query, key, value), expected.transpose(1, 2))
