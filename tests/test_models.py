"""Whole architectures of Hugging Face transformers and timm, small and with random weights, under ``replace``, under
``accelerate`` and with our attention: each beside the model as it is.

Tier 1 runs ``auto`` on the CPU, where the bits are to be the same, and tier 2 the kernels in the interpreter. What is
found is the table in docs/architectures.md: ``pytest -m torch tests/test_models.py --update-architectures`` writes it,
and so does ``-m interpret``, each its own part.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.overrides import TorchFunctionMode

import tritune
from tritune.ops import record

transformers = pytest.importorskip("transformers")
from test_transformers import BATCH, MODELS, assert_models_close, exact, outcome  # noqa: E402  (it needs transformers, too)
from test_transformers import inputs_of as inputs_of_attention  # noqa: E402

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/architectures.md"
CLASSES, IMAGE, STEPS = 3, 32, 20

on_torch = pytest.mark.torch
on_kernels = pytest.mark.interpret
# Warnings of libraries, which no code of ours can avoid.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


# --- architectures ---------------------------------------------------------------------------------------------------


def resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=CLASSES)
    return transformers.ResNetForImageClassification(config)


def convnext() -> Any:
    config = transformers.ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=CLASSES, drop_path_rate=0.1,
        layer_scale_init_value=1.0,
    )  # fmt: skip
    return transformers.ConvNextForImageClassification(config)


def mobilenet_v2() -> Any:
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, num_labels=CLASSES, image_size=IMAGE
    )
    return transformers.MobileNetV2ForImageClassification(config)


class Autoencoder(nn.Module):
    """EnCodec without its quantiser, which passes no gradient on to the encoder."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.EncodecConfig(
            num_filters=4, hidden_size=8, upsampling_ratios=[4, 2], codebook_size=8, codebook_dim=8
        )
        whole = transformers.EncodecModel(config)
        self.encoder, self.decoder = whole.encoder, whole.decoder

    def forward(self, input_values: Tensor) -> Any:
        return self.decoder(self.encoder(input_values))


def segformer() -> Any:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=CLASSES,
        initializer_range=0.25,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def timm() -> Any:
    return pytest.importorskip("timm")


def timm_resnet() -> Any:
    models = timm().models.resnet
    return models.ResNet(models.Bottleneck, [1, 1, 1, 1], CLASSES, channels=(4, 4, 8, 8))


def timm_efficientnet() -> Any:
    blocks = timm().models._efficientnet_builder.decode_arch_def(
        [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k5_s2_e3_c8_se0.25"], ["ir_r1_k3_s2_e3_c16_se0.25"]]
    )
    return timm().models.efficientnet.EfficientNet(
        blocks, CLASSES, num_features=16, stem_size=8, act_layer=nn.SiLU, drop_path_rate=0.1
    )


def timm_convnext() -> Any:
    return timm().models.convnext.ConvNeXt(
        num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), drop_path_rate=0.1, ls_init_value=1.0
    )


def timm_swin() -> Any:
    # Of two blocks of a stage the second has shifted windows, and so a mask.
    return timm().models.swin_transformer.SwinTransformer(
        img_size=IMAGE, patch_size=4, num_classes=CLASSES, embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=4
    )


OF_TRANSFORMERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "resnet": ("ResNet", resnet),
    "convnext": ("ConvNeXt", convnext),
    "mobilenet_v2": ("MobileNetV2", mobilenet_v2),
    "encodec": ("EnCodec", Autoencoder),
    "wav2vec2": ("Wav2Vec2", MODELS["wav2vec2"]),
    "whisper": ("Whisper", MODELS["whisper"]),
    "vit": ("ViT", MODELS["vit"]),
    "segformer": ("SegFormer", segformer),
    "gpt2": ("GPT-2", MODELS["gpt2"]),
    "llama": ("Llama", MODELS["llama"]),
    "mistral": ("Mistral", MODELS["mistral"]),
    "gemma2": ("Gemma 2", MODELS["gemma2"]),
    "bert": ("BERT", MODELS["bert"]),
    "gpt_oss": ("gpt-oss", MODELS["gpt_oss"]),
}
OF_TIMM: dict[str, tuple[str, Callable[[], Any]]] = {
    "timm_resnet": ("timm's ResNet", timm_resnet),
    "timm_efficientnet": ("timm's EfficientNet", timm_efficientnet),
    "timm_convnext": ("timm's ConvNeXt", timm_convnext),
    "timm_swin": ("timm's Swin", timm_swin),
}
ARCHITECTURES = {**OF_TRANSFORMERS, **OF_TIMM}


def make(name: str, seed: int = 0) -> Any:
    """In evaluation mode, with norms and biases that are not 0 and 1, and with the attention that most users have."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name][1]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.2)
    return model


def inputs_of(name: str, seed: int = 0) -> dict[str, Tensor]:
    if name in MODELS:
        return inputs_of_attention(name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if name == "encodec":
        return {"input_values": torch.randn(BATCH, 1, 64, generator=generator)}
    return {"x" if name in OF_TIMM else "pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)}


# In the interpreter a minute and more for each way; the rest as a whole takes three.
LARGE = ("mobilenet_v2", "timm_resnet", "timm_efficientnet")
INTERPRETED = [
    pytest.param(name, marks=[pytest.mark.full] if name == "timm_convnext" else [])
    for name in ARCHITECTURES if name not in LARGE
]  # fmt: skip


# --- ways to our functions -------------------------------------------------------------------------------------------

WAYS = ("replace", "accelerate", "attention")


def original(name: str, way: str, seed: int = 0) -> Any:
    """The model that a way is compared with. Our attention has ``"eager"`` as its definition."""
    model = make(name, seed)
    if way == "attention" and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model


def changed(model: Any, way: str) -> Any:
    model = copy.deepcopy(model)
    if way == "replace":
        tritune.replace(model)
    elif way == "attention" and hasattr(model, "set_attn_implementation"):
        tritune.register_with_transformers()
        with contextlib.suppress(ValueError):  # an architecture that has its attention written out
            model.set_attn_implementation("tritune")
    return model


def block(way: str) -> Any:
    return tritune.accelerate() if way == "accelerate" else contextlib.nullcontext()


def calls_of(model: Any, inputs: dict[str, Tensor], way: str) -> list[Any]:
    """The decisions of all calls that come to our functions."""
    with torch.no_grad(), record() as decisions, block(way):
        model(**inputs)
    return decisions


def call_of(model: Any, compiled: bool) -> Any:
    return torch.compile(model, backend="aot_eager") if compiled else model


class WhereCovered(TorchFunctionMode):
    """Under ``use_backend("triton")``, innermost of all blocks: torch computes a call that no kernel covers, instead of
    the error. A recurrent module asks before it calls a function, so :meth:`around` is for modules.

    Attributes:
        refused: the messages of all such calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, *args, **(kwargs or {}))

    def around(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module.forward = functools.partial(self.call, module.forward)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except tritune.UnsupportedError as error:
            self.refused.append(str(error))
            with tritune.use_backend("torch"):
                return function(*args, **kwargs)


# --- the table -------------------------------------------------------------------------------------------------------

COLUMNS = [(way, compiled) for compiled in (False, True) for way in WAYS]
HEADERS = [f"{way}, compiled" if compiled else way for way, compiled in COLUMNS]
Cells = dict[tuple[str, str], str]


def markers(tier: str) -> tuple[str, str]:
    return f"<!-- {tier}: begin -->\n", f"<!-- {tier}: end -->\n"


def read_cells(document: str, tier: str) -> Cells:
    """By architecture and column, as they are written."""
    begin, end = markers(tier)
    rows = document.partition(begin)[2].partition(end)[0].splitlines()[2:]
    cells = {}
    for row in rows:
        title, *found = (cell.strip() for cell in row.strip("|").split("|"))
        cells.update({(title, header): cell for header, cell in zip(HEADERS, found, strict=True)})
    return cells


def with_cells(document: str, tier: str, cells: Cells) -> str:
    rows = [["architecture", *HEADERS], ["---"] * (1 + len(HEADERS))]
    rows += [[title, *(cells.get((title, header), "") for header in HEADERS)] for title, _ in ARCHITECTURES.values()]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    begin, end = markers(tier)
    before, _, rest = document.partition(begin)
    return before + begin + table + end + rest.partition(end)[2]


@pytest.fixture(scope="module")
def is_as_committed(pytestconfig: pytest.Config, tier: str) -> Iterator[Callable[[str, str, bool, str], None]]:
    """Compares what was found with the table, or collects it for a new one."""
    written = read_cells(DOCUMENT.read_text(encoding="utf-8"), tier)
    updates = pytestconfig.getoption("--update-architectures")

    def compare(name: str, way: str, compiled: bool, found: str) -> None:
        place = ARCHITECTURES[name][0], HEADERS[COLUMNS.index((way, compiled))]
        if updates:
            written[place] = found
        assert written.get(place) == found, "docs/architectures.md is out of date: --update-architectures writes it"

    yield compare
    if updates:
        DOCUMENT.write_text(with_cells(DOCUMENT.read_text(encoding="utf-8"), tier, written), encoding="utf-8")


# --- what each cell says ---------------------------------------------------------------------------------------------


def has_same_bits(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    assert ours.keys() == wanted.keys()
    return all(torch.equal(ours[part], wanted[part]) for part in wanted)


def assert_verdict(name: str, way: str, ours: dict[str, Tensor]) -> None:
    """Every part against float64, beside the error of the original in float32."""

    def sample(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model, inputs = original(name, way, seed), inputs_of(name, seed)
        return exact(model, inputs), outcome(model, inputs)

    assert_models_close(name, ours, sample)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@on_torch
@pytest.mark.checkout
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_auto(name: str, way: str, compiled: bool, is_as_committed: Callable[..., None]) -> None:
    """On the CPU torch serves: the bits of output and gradients are the model's own, and our attention has the error of
    its definition. What is compiled may have the bits of the original either as it is or compiled."""
    model, inputs = original(name, way), inputs_of(name)
    ours = changed(model, way)
    if not calls_of(ours, inputs, way):
        is_as_committed(name, way, compiled, "-")
        return
    with block(way):
        found = outcome(ours, inputs, call_of(ours, compiled))
    same = has_same_bits(found, outcome(copy.deepcopy(model), inputs))
    if compiled and not same:  # the compiler may have changed the original's bits, too
        same = has_same_bits(found, outcome(model, inputs, call_of(model, compiled)))
    if not same:
        # Dynamo runs torch's LSTM outside of its graphs, and ours in them, in the operators of which it consists.
        is_lstm = compiled and way == "replace" and any(isinstance(module, nn.LSTM) for module in model.modules())
        assert way == "attention" or is_lstm, "other bits than torch's"
        assert_verdict(name, way, found)
    is_as_committed(name, way, compiled, "same bits" if same else "verdict")


@on_torch
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_restored_it_is_as_before(name: str) -> None:
    model, inputs, seen = make(name), inputs_of(name), []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, path=path: seen.append(path))
    wanted = outcome(copy.deepcopy(model), inputs)
    before = [(type_before_parametrizations(module), dict(vars(module))) for module in model.modules()]
    order, seen[:] = list(seen), []
    state = {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}

    tritune.replace(model)
    replaced = model.state_dict(keep_vars=True)
    assert list(replaced) == list(state) and all(replaced[key] is value for key, (value, _) in state.items())
    tritune.restore(model)
    after = [(type_before_parametrizations(module), dict(vars(module))) for module in model.modules()]
    assert [kind for kind, _ in after] == [kind for kind, _ in before]
    for (_, now), (_, then) in zip(after, before, strict=True):
        assert now.keys() == then.keys() and all(now[entry] is then[entry] for entry in then if entry != "training")
    assert all(torch.equal(value, copied) for value, copied in state.values())
    assert has_same_bits(outcome(model, inputs), wanted) and seen == order


@on_torch
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_has_the_same_bits(name: str) -> None:
    """Dropout, running statistics and all."""

    def train(way: str) -> dict[str, Tensor]:
        model = changed(make(name), way) if way else make(name)
        if name == "wav2vec2":
            model.config.apply_spec_augment = False  # it draws from numpy, and wants longer inputs
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.5)
        torch.manual_seed(3)
        for step in range(STEPS):
            optimizer.zero_grad()
            with block(way):
                out = model(**inputs_of(name, seed=step))
                y = out if isinstance(out, Tensor) else out[0]
                y.square().mean().backward()
            optimizer.step()
        return model.state_dict()

    wanted, before = train(""), make(name).state_dict()
    assert sum(not torch.equal(wanted[key], before[key]) for key in wanted) > len(wanted) / 2
    assert all(value.isfinite().all() for value in wanted.values())
    for way in ("replace", "accelerate"):
        assert has_same_bits(train(way), wanted), way


@on_kernels
@pytest.mark.checkout
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels(name: str, way: str, compiled: bool, is_as_committed: Callable[..., None]) -> None:
    """Where the kernels cover a call they have the error of the original; the table says which calls they do not cover,
    and torch serves these here. Under torch.compile there is no such second try."""
    model, inputs = original(name, way), inputs_of(name)
    ours = changed(model, way)
    decisions = calls_of(ours, inputs, way)
    refused = sorted({f"{one.op}, {one.rejected}" for one in decisions if one.rejected})
    torchs = f"torch: {'; '.join(refused)}" if refused else ""
    if not decisions or (refused and (compiled or all(one.rejected for one in decisions))):
        is_as_committed(name, way, compiled, torchs or "-")
        return
    where_covered = WhereCovered()
    if refused:
        where_covered.around(ours)
    with tritune.use_backend("triton"), block(way), where_covered if refused else contextlib.nullcontext():
        found = outcome(ours, inputs, call_of(ours, compiled))
    assert bool(where_covered.refused) == bool(refused)
    assert not has_same_bits(found, outcome(copy.deepcopy(model), inputs)), "torch has served"
    assert_verdict(name, way, found)
    is_as_committed(name, way, compiled, f"verdict; {torchs}" if refused else "verdict")
