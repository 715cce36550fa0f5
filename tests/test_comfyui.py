"""The nodes for ComfyUI: the contract that it publishes, and the workflow from end to end.

ComfyUI is in no package registry; what nodes use of it (a progress bar, its device, its interrupt) is stood in for.
"""

import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from command_line import toy_model
from media_files import tone
from stableavatar import load
from stableavatar.errors import InputError

FOLDER = Path(__file__).parents[1] / "integrations" / "comfyui"
WORKFLOW = json.loads((FOLDER / "workflow.json").read_text(encoding="utf-8"))
# Of ComfyUI itself, those that the workflow uses: their outputs.
THEIRS = {"LoadImage": ("IMAGE", "MASK"), "LoadAudio": ("AUDIO",), "CreateVideo": ("VIDEO",), "SaveVideo": ()}


class CancelledByUserError(Exception):
    """As ComfyUI raises where Cancel was pressed."""


class Comfy:
    """What ComfyUI does while nodes work."""

    def __init__(self) -> None:
        self.shown: list[float] = []
        self.unloaded = 0
        self.interrupted_after: int | None = None

    def bar(self, total: int) -> Any:
        def update(value: int, _total: int | None = None) -> None:
            self.shown.append(value / total)

        return SimpleNamespace(update_absolute=update)

    def unload(self) -> None:
        self.unloaded += 1

    def throw(self) -> None:
        if self.interrupted_after is not None and len(self.shown) >= self.interrupted_after:
            raise CancelledByUserError


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Comfy:
    fake = Comfy()
    utils, management, whole = (
        ModuleType("comfy.utils"),
        ModuleType("comfy.model_management"),
        ModuleType("comfy"),
    )
    utils.ProgressBar = fake.bar  # type: ignore[attr-defined]
    management.unload_all_models = fake.unload  # type: ignore[attr-defined]
    management.get_torch_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    management.throw_exception_if_processing_interrupted = fake.throw  # type: ignore[attr-defined]
    whole.utils, whole.model_management = utils, management  # type: ignore[attr-defined]
    for module in (whole, utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


@pytest.fixture
def pack(comfy: Comfy) -> Iterator[ModuleType]:
    """The folder as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location(
        "stableavatar_nodes", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["stableavatar_nodes"] = module
    spec.loader.exec_module(module)
    yield module
    for name in ("stableavatar_nodes", "stableavatar_nodes.nodes"):
        sys.modules.pop(name, None)


def test_nodes_keep_to_the_contract(pack: ModuleType) -> None:
    assert set(pack.NODE_CLASS_MAPPINGS) == set(pack.NODE_DISPLAY_NAME_MAPPINGS)
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        asked = node.INPUT_TYPES()
        assert set(asked) <= {"required", "optional", "hidden"}, name
        assert isinstance(node.RETURN_TYPES, tuple)
        assert len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
        assert isinstance(node.CATEGORY, str)
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        given = {**asked["required"], **asked.get("optional", {})}
        assert set(parameters) - {"self"} == set(given), name
        for field in asked.get("optional", {}):
            assert parameters[field].default is not inspect.Parameter.empty
        for field, entry in given.items():
            kind, settings = entry[0], entry[1] if len(entry) > 1 else {}
            assert isinstance(kind, str | list), field
            if kind in ("INT", "FLOAT"):
                assert settings["min"] <= settings["default"] <= settings["max"], field
            if kind == "FLOAT":  # or ComfyUI's page rounds to what it thinks right
                assert settings["round"] <= 0.01, field
                assert settings["step"] >= settings["round"], field
            if isinstance(kind, list):
                assert settings.get("default", kind[0]) in kind, field


def test_the_workflow_fits_the_nodes(pack: ModuleType) -> None:
    nodes = {node["id"]: node for node in WORKFLOW["nodes"]}
    for number, start, slot, end, place, kind in WORKFLOW["links"]:
        output, taken = nodes[start]["outputs"][slot], nodes[end]["inputs"][place]
        assert output["type"] == taken["type"] == kind
        assert number in output["links"]
        assert taken["link"] == number
    for node in nodes.values():
        ours = pack.NODE_CLASS_MAPPINGS.get(node["type"])
        if ours is None:
            assert tuple(it["type"] for it in node["outputs"]) == THEIRS[node["type"]]
            continue
        assert tuple(it["type"] for it in node["outputs"]) == ours.RETURN_TYPES
        assert len(node["widgets_values"]) == len(widgets(ours))
        for taken in node["inputs"]:
            asked = ours.INPUT_TYPES()
            assert {**asked["required"], **asked.get("optional", {})}[taken["name"]][0] == taken["type"]


def widgets(node: Any) -> list[str]:
    """The fields that ComfyUI draws, in their order; after a seed it draws what becomes of it."""
    asked = node.INPUT_TYPES()
    found = []
    for name, entry in {**asked["required"], **asked.get("optional", {})}.items():
        if isinstance(entry[0], list) or entry[0] in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            found.append(name)
            if len(entry) > 1 and entry[1].get("control_after_generate"):
                found.append("control_after_generate")
    return found


def run_workflow(
    pack: ModuleType, given: dict[str, tuple[Any, ...]], changed: dict[str, Any]
) -> dict[str, Any]:
    """What each node of the workflow gives, by its type; `given` are those of ComfyUI."""
    made: dict[int, tuple[Any, ...]] = {}
    links = {link[0]: link for link in WORKFLOW["links"]}
    for node in sorted(WORKFLOW["nodes"], key=lambda node: int(node["order"])):
        ours = pack.NODE_CLASS_MAPPINGS.get(node["type"])
        if ours is None:
            made[node["id"]] = given.get(node["type"], ())
            continue
        values = dict(zip(widgets(ours), node["widgets_values"], strict=True))
        values.pop("control_after_generate", None)
        for taken in node["inputs"]:
            link = links[taken["link"]]
            values[taken["name"]] = made[link[1]][link[2]]
        values |= {name: value for name, value in changed.items() if name in values}
        with torch.inference_mode():  # as ComfyUI runs nodes
            made[node["id"]] = getattr(ours(), ours.FUNCTION)(**values)
    return {node["type"]: made[node["id"]] for node in WORKFLOW["nodes"]}


@pytest.fixture
def given() -> dict[str, tuple[Any, ...]]:
    picture = torch.from_numpy(np.random.default_rng(0).random((1, 40, 48, 3), dtype=np.float32))
    stereo = torch.from_numpy(np.stack([tone(1.0, 44100)] * 2)).float()[None]
    return {"LoadImage": (picture, None), "LoadAudio": ({"waveform": stereo, "sample_rate": 44100},)}


QUICK = {
    "model": str(toy_model()),
    "steps": 2,
    "text_scale": 1.0,
    "audio_scale": 1.0,
    "width": 32,
    "height": 32,
}


def test_the_workflow_makes_the_frames_of_the_package(
    pack: ModuleType, comfy: Comfy, given: dict[str, tuple[Any, ...]]
) -> None:
    images, fps = run_workflow(pack, given, QUICK)["StableAvatarDecode"]
    assert (images.shape, images.dtype, fps) == ((25, 32, 32, 3), torch.float32, 25.0)
    assert comfy.unloaded == 1  # or two models would share the memory
    assert comfy.shown[-1] == 1.0
    assert max(comfy.shown) == 1.0
    conditions = pack.NODE_CLASS_MAPPINGS["StableAvatarConditions"]().condition(
        given["LoadImage"][0], "A woman is talking", 32, 32, 25.0, 0.0, given["LoadAudio"][0]
    )[0]
    stream = load(toy_model(), device="cpu").stream(
        conditions["portrait"], conditions["speech"], seed=1, steps=2, text_scale=1.0, audio_scale=1.0, width=32,
        height=32, prompt="A woman is talking",
    )  # fmt: skip
    frames = (images * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(frames, np.stack(list(stream)))


def test_what_saves_memory_reaches_the_package(pack: ModuleType, given: dict[str, tuple[Any, ...]]) -> None:
    latents = run_workflow(pack, given, {**QUICK, "window": 9, "decoder_tiling": True})["StableAvatarSample"][
        0
    ]
    assert (latents.options.window, latents.options.decoder_tiling) == (9, True)


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        (
            ("folder", "square", "bfloat16", " a.pt \n\nb.pt:0.5\n", "14b", "layers"),
            {"dtype": "bfloat16", "lora": ["a.pt", "b.pt:0.5"], "variant": "square", "size": "14b", "offload": "layers"},
        ),
        (("folder", "default", "auto"), {"dtype": "auto", "lora": [], "offload": "none"}),
    ],
)  # fmt: skip
def test_what_is_asked_of_a_model_reaches_the_package(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch, fields: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr(pack.nodes, "load", lambda *model, **given: (model, given))
    ((model, given),) = pack.NODE_CLASS_MAPPINGS["LoadStableAvatar"]().load(*fields)
    assert model == ("folder",)
    assert given == {"device": "cpu", **arguments}


@pytest.mark.parametrize(
    ("conditions", "fields", "options"),
    [
        (
            {"width": 48, "height": 32, "fps": 29.97, "duration": 0.5, "negative_prompt": "blurry"},
            {"seed": 7, "steps": 3, "text_scale": 1.5, "audio_scale": 2.5, "overlap": 2, "order": "causal", "window": 9,
             "decoder_tiling": True},
            {},
        ),
        (
            {"width": 0, "height": 0, "fps": 25.0, "duration": 0.0, "negative_prompt": " "},
            {"seed": 0, "steps": 0, "text_scale": 0.0, "audio_scale": 0.0, "overlap": 0, "order": "wavefront", "window": 0,
             "decoder_tiling": False},
            {"fps": 25.0, "seed": 0, "order": "wavefront"},
        ),
    ],
)  # fmt: skip
def test_what_is_asked_of_a_video_reaches_the_package(
    pack: ModuleType,
    given: dict[str, tuple[Any, ...]],
    conditions: dict[str, Any],
    fields: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """All of it, or of 0 and empty nothing."""
    nodes = pack.NODE_CLASS_MAPPINGS
    (asked,) = nodes["StableAvatarConditions"]().condition(
        given["LoadImage"][0], "x", speech=given["LoadAudio"][0], **conditions
    )
    pipeline = SimpleNamespace(sample_latents=lambda *inputs, **options: (inputs, options))
    (((picture, speech), made),) = nodes["StableAvatarSample"]().sample(pipeline, asked, **fields)
    assert (picture.shape, picture.dtype, speech.shape) == ((40, 48, 3), np.uint8, (16_000,))
    made.pop("progress")
    assert made == {"prompt": "x", **(options or {**conditions, **fields})}


def test_a_width_without_a_height_is_said(pack: ModuleType, given: dict[str, tuple[Any, ...]]) -> None:
    with pytest.raises(InputError, match="height"):
        run_workflow(pack, given, {**QUICK, "height": 0})


@pytest.mark.parametrize("after", [1, 12])
def test_cancel_stops_it(
    pack: ModuleType, comfy: Comfy, given: dict[str, tuple[Any, ...]], after: int
) -> None:
    comfy.interrupted_after = after
    with pytest.raises(CancelledByUserError):
        run_workflow(pack, given, QUICK)
    assert len(comfy.shown) == after


def test_a_silent_video(pack: ModuleType, given: dict[str, tuple[Any, ...]]) -> None:
    node = pack.NODE_CLASS_MAPPINGS["StableAvatarConditions"]()
    conditions = node.condition(given["LoadImage"][0], "x", 0, 0, 25.0, 0.4)[0]
    assert conditions["speech"] is None
    assert conditions["options"] == {"prompt": "x", "fps": 25.0, "duration": 0.4}
