"""``attn_implementation="tritune"`` of Hugging Face transformers against its own ``"eager"``, with random weights.

The exact reference is ``"eager"`` in float64 throughout, and the bar is the error of ``"eager"`` in float32.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import TORCH_SAMPLES, assert_close, backend_of, few_dots
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tritune
from tritune.autotune.check import Errors
from tritune.huggingface import attend, runs_with_sdpa
from tritune.ops import record

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch
on_kernels = pytest.mark.interpret

BATCH, LENGTH, VOCABULARY = 2, 7, 32
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}
WINDOW = 3


@pytest.fixture(autouse=True)
def registered() -> None:
    tritune.register_with_transformers()


def gpt2(**options: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32, **{**TOKENS, **options}
    )
    return transformers.GPT2LMHeadModel(config)


def causal_lm(family: str, **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**GROUPED, **TOKENS, **options)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def bert() -> Any:
    config = transformers.BertConfig(**SIZES, initializer_range=0.25)
    return transformers.BertModel(config, add_pooling_layer=False)


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> Any:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, initializer_range=0.25)
    return transformers.ViTModel(config, add_pooling_layer=False)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=4, max_source_positions=5,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=[], begin_suppress_tokens=[], init_std=0.25,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def wav2vec2() -> Any:
    config = transformers.Wav2Vec2Config(
        **SIZES, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 4), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, initializer_range=0.25,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def gemma2() -> Any:
    # Most scores are beyond the cap.
    return causal_lm("Gemma2", sliding_window=WINDOW, attn_logit_softcapping=1.5, query_pre_attn_scalar=1)


def gpt_oss() -> Any:
    model = causal_lm("GptOss", sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1)
    model.set_experts_implementation("eager")  # its other kernels have no float64
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "llama": functools.partial(causal_lm, "Llama"),
    "mistral": functools.partial(causal_lm, "Mistral", sliding_window=WINDOW),
    "qwen3": functools.partial(causal_lm, "Qwen3"),
    "gemma2": gemma2,
    "gpt_oss": gpt_oss,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "whisper": whisper,
    "wav2vec2": wav2vec2,
}
PADDED = ("gpt2", "llama", "mistral", "gemma2", "gpt_oss", "bert", "t5")
ON_TORCH_ALONE = ("qwen3", "gemma2", "vit", "wav2vec2")  # a soft cap, or like another
CASES = [
    pytest.param(
        name, padding, id=f"{name}-{padding or 'whole'}",
        marks=[] if name in ON_TORCH_ALONE else [on_kernels],
    )
    for name in MODELS for padding in ("", "left", "right") if not padding or name in PADDED
]  # fmt: skip


def make(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases, norms and sinks, which begin as 0 or 1
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.5)
    model.set_attn_implementation("eager")
    return model


def inputs_of(name: str, padding: str = "", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator)}
    if name == "wav2vec2":
        return {"input_values": torch.randn(BATCH, 64, generator=generator)}
    tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(BATCH, 4, 10, generator=generator), "decoder_input_ids": tokens}
    inputs = {"input_ids": tokens}
    if name == "t5":
        inputs["decoder_input_ids"] = tokens[:, :4]
    if padding:
        inputs["attention_mask"] = padding_mask(padding)
    return inputs


def padding_mask(side: str) -> Tensor:
    """The first sequence is shorter than the second by more than the window."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, slice(4) if side == "left" else slice(-4, None)] = 0
    return mask


class InFloat64(TorchFunctionMode):
    """Whoever asks for float32 gets float64: models take norms, rotations and softmax in float32, whatever they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if one is torch.float32 else one for one in args]
        kwargs = {name: torch.float64 if one is torch.float32 else one for name, one in (kwargs or {}).items()}
        return func(*args, **kwargs)


def results(model: Any, inputs: dict[str, Tensor], implementation: str) -> dict[str, Tensor]:
    """The :func:`outcome` of a copy of the model with this attention."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    return outcome(model, inputs)


def outcome(model: Any, inputs: dict[str, Tensor], call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Output, and the gradients of all parameters for a random gradient of it. Those of one layer are one tensor: the
    gradient of a bias of keys alone is 0 but for rounding. ``call`` is the model, compiled."""
    out = (model if call is None else call)(**inputs)
    y = out if isinstance(out, Tensor) else out[0]  # logits, or the last hidden state
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    layers = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layers[name.rpartition(".")[0]].append(parameter.grad.flatten())
    return {"output": y.detach(), **{f"gradients of {name}": torch.cat(grads) for name, grads in layers.items()}}


def exact(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    with InFloat64():
        return outcome(copy.deepcopy(model).double(), wide)


def assert_models_close(
    name: str, ours: dict[str, Tensor], sample: Callable[[int], tuple[dict[str, Tensor], dict[str, Tensor]]]
) -> None:
    """Each part by the one verdict. ``sample(seed)`` gives the parts in float64 and those of the definition; seed 0 is
    that of ours."""
    sample = functools.cache(sample)

    def others(part: str) -> Iterator[Errors]:
        for seed in range(1, TORCH_SAMPLES):
            wanted, theirs = sample(seed)
            yield Errors.of(theirs[part], wanted[part])

    wanted, theirs = sample(0)
    assert ours.keys() == wanted.keys()
    for part in wanted:
        assert_close(f"{name}: {part}", ours[part], wanted[part], theirs[part], others(part), together=True)


@pytest.mark.parametrize("name, padding", CASES)
def test_equals_eager(name: str, padding: str, tier: str) -> None:
    model, inputs = make(name), inputs_of(name, padding)
    with tritune.use_backend(backend_of(tier)), few_dots():
        ours = results(model, inputs, "tritune")

    def eager(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        one, given = make(name, seed), inputs_of(name, padding, seed)
        return exact(one, given), results(one, given, "eager")

    assert_models_close(name, ours, eager)


def test_each_model_feels_what_it_is_here_for() -> None:
    """Without its cap, sinks or window the output of a model is another."""
    for name, changed in (("gemma2", "cap"), ("gpt_oss", "sinks"), ("mistral", "window"), ("t5", "bias")):
        model, inputs = make(name), inputs_of(name)
        before = results(model, inputs, "tritune")["output"]
        for module in model.modules():
            if changed == "cap" and hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = None
            elif changed == "sinks" and hasattr(module, "sinks"):
                module.sinks.data.fill_(-100.0)
            elif changed == "bias" and hasattr(module, "relative_attention_bias"):
                module.relative_attention_bias.weight.data.zero_()
        if changed == "window":
            model.config.sliding_window = LENGTH + 1
        after = results(model, inputs, "tritune")["output"]
        assert (after - before).abs().max() > 1e-2 * before.abs().max(), name


# --- generation, compilation, training -------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_generates_the_same_tokens(name: str, cache: str) -> None:
    """Two prompts of different lengths, token by token, through a cache; the window is shorter than either."""
    model, inputs = make(name), inputs_of(name, "left")
    model.get_input_embeddings().weight.data *= 8.0  # or biases decide, and each token is the same
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache if cache == "static" else None}
    generated = {}
    for implementation in ("eager", "tritune"):
        model.set_attn_implementation(implementation)
        generated[implementation] = model.generate(**inputs, **options)
    assert torch.equal(generated["tritune"], generated["eager"])
    assert generated["eager"].shape == (BATCH, LENGTH + 8)
    assert len(generated["eager"][:, LENGTH:].unique()) > 3, "a model that repeats itself shows nothing"


@on_kernels
def test_generates_with_the_kernels(tier: str) -> None:
    model, inputs = make("llama"), inputs_of("llama", "left")
    wanted = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model.set_attn_implementation("tritune")
    with tritune.use_backend(backend_of(tier)):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), wanted)


def test_a_prompt_in_parts() -> None:
    """Some queries on keys of before: fewer queries than keys, and causal from the end."""
    model, tokens = make("llama"), inputs_of("llama")["input_ids"]
    model.set_attn_implementation("tritune")
    whole = model(tokens).logits
    first = model(tokens[:, :3], use_cache=True)
    second = model(tokens[:, 3:], cache=first.cache)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["", "left"])
def test_compiles(padding: str) -> None:
    """The whole model is one graph, and with padding a row that sees no key is found in it."""
    model, inputs = make("llama"), inputs_of("llama", padding)
    model.set_attn_implementation("tritune")
    wanted = results(model, inputs, "tritune")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(**inputs).logits
    torch.testing.assert_close(y, wanted["output"])
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    grad = torch.cat([p.grad.flatten() for p in model.model.layers[0].self_attn.q_proj.parameters()])
    torch.testing.assert_close(grad, wanted["gradients of model.layers.0.self_attn.q_proj"])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_gradient_checkpointing(name: str) -> None:
    """A step of training, with dropout where the model has it: computed again, each layer gives the same bits."""
    model, inputs = make(name).train(), {**inputs_of(name, "left"), "use_cache": False}
    torch.manual_seed(2)
    wanted = results(model, inputs, "tritune")
    model.activation_checkpointing_enable()
    torch.manual_seed(2)
    with record() as decisions:
        got = results(model, inputs, "tritune")
    assert len(decisions) == 4, "two layers, forward and again in backward"
    assert got.keys() == wanted.keys()
    for part in wanted:
        assert torch.equal(got[part], wanted[part]), part


def test_weights_of_attention() -> None:
    model, inputs = make("llama"), inputs_of("llama", "left")
    wanted = model(**inputs, output_attentions=True)
    model.set_attn_implementation("tritune")
    got = model(**inputs, output_attentions=True)
    torch.testing.assert_close(got.logits, wanted.logits)
    assert len(got.attentions) == 2
    for ours, theirs in zip(got.attentions, wanted.attentions, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- single calls ----------------------------------------------------------------------------------------------------

B, H, KH, M, N, D = 2, 4, 2, 5, 7, 8
QKV = ("query", "key", "value")


class Layer(torch.nn.Module):
    """A layer as the attention functions see it."""

    def __init__(self, config: type = transformers.LlamaConfig, **attributes: Any) -> None:
        super().__init__()
        self.config, self.num_key_value_groups, self.head_dim = config(), H // KH, D
        for name, attribute in attributes.items():
            setattr(self, name, attribute)


def padded(dtype: torch.dtype | None = None) -> Tensor:
    """[B, 1, M, N], causal from the end, with padding on the left: the first queries of the first sequence see none."""
    mask = torch.ones(M, N, dtype=torch.bool).tril(N - M).expand(B, 1, M, N).clone()
    mask[0, ..., :4] = False
    assert not mask.any(-1).all()
    return mask if dtype is None else torch.where(mask, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def eager_of(family: str) -> Callable[..., Any]:
    module = getattr(transformers.models, family)
    return getattr(module, f"modeling_{family}").eager_attention_forward


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "scaled": ("llama", {"scaling": 1.5}),
    "softcap": ("gemma2", {"softcap": 1.5}),
    "sinks": ("gpt_oss", {"s_aux": (H,)}),
    "sink of a row": ("inkling2", {"sinks": (B, H, M, 1)}),
    "position bias": ("inkling2", {"position_bias": (1, H, M, N)}),
}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # finfo.min * log2(e), of which exp is 0
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("masks", ["none", "bool", "numbers"])
@pytest.mark.parametrize("call", [pytest.param(one, marks=[] if one == "softcap" else on_kernels) for one in CALLS])
def test_a_call(call: str, masks: str, dtype: torch.dtype, tier: str) -> None:
    """Against the attention that the models themselves define, with a row that sees no key where there is a mask."""
    family, options = CALLS[call]

    def draw() -> tuple[dict[str, Tensor], Tensor]:
        shapes = {"query": (B, H, M, D), "key": (B, KH, N, D), "value": (B, KH, N, D)}
        shapes |= {name: shape for name, shape in options.items() if isinstance(shape, tuple)}
        return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, torch.randn(B, M, H, D).to(dtype)

    def run(attention: Callable[..., Any], drawn: Any, wide: bool = False) -> dict[str, Tensor]:
        tensors, dy = drawn
        to = torch.float64 if wide else dtype
        leaves = {name: t.to(to).requires_grad_() for name, t in tensors.items()}
        mask = {"none": None, "bool": padded(), "numbers": padded(to)}[masks]
        if attention is not attend and masks == "bool":
            mask = padded(to)
        keywords = {name: one for name, one in options.items() if not isinstance(one, tuple)}
        layer = Layer(is_causal=False, sinks=leaves.get("s_aux"))
        keywords = {"scaling": D**-0.5, **keywords, **{name: t for name, t in leaves.items() if name not in QKV}}
        y, _ = attention(layer, *(leaves[name] for name in QKV), mask, **keywords)
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(to))
        return {"output": y, **{f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}}

    def errors(part: str) -> Iterator[Errors]:
        for _ in range(1, TORCH_SAMPLES):
            other = draw()
            with InFloat64():
                wanted = run(eager_of(family), other, wide=True)
            yield Errors.of(run(eager_of(family), other)[part].detach(), wanted[part].detach())

    drawn = draw()
    with InFloat64():
        wanted = run(eager_of(family), drawn, wide=True)
    eagers = run(eager_of(family), drawn)
    with tritune.use_backend(backend_of(tier)), few_dots():
        ours = run(attend, drawn)
    for part in wanted:
        if part == "grad position_bias" and masks != "none":  # docs/transformers.md: none of a row that sees no key
            sees = padded().any(-1, keepdim=True).all(0, keepdim=True)
            ours[part], wanted[part], eagers[part] = (
                torch.where(sees, one[part], 0.0) for one in (ours, wanted, eagers)
            )  # fmt: skip
        assert_close(part, ours[part], wanted[part], eagers[part], errors(part), together=True)


def qkv(keys: int = N) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, M, D), torch.randn(B, KH, keys, D), torch.randn(B, KH, keys, D)


def test_no_mask_of_a_causal_layer() -> None:
    """Places of a static cache behind the last query are empty, whatever they hold; a single query sees everything."""
    query, key, value = qkv()
    key[:, :, M:] = value[:, :, M:] = torch.nan
    for options in ({}, {"softcap": 2.0}, {"s_aux": torch.randn(H)}, {"position_bias": torch.randn(1, H, M, N)}):
        out, weights = attend(Layer(is_causal=True), query, key, value, None, **options)
        mask = torch.ones(M, M, dtype=torch.bool).tril()
        short = {name: one[..., :M] if name == "position_bias" else one for name, one in options.items()}
        wanted, _ = attend(Layer(), query, key[:, :, :M], value[:, :, :M], mask, **short)
        torch.testing.assert_close(out, wanted)
        assert weights is None, "nobody asked for them"
        assert torch.equal(attend(Layer(is_causal=False), query, key, value, None, is_causal=True, **options)[0], out)
        key, value = key.nan_to_num(1.0), value.nan_to_num(1.0)
        if "position_bias" not in options:
            last = (query[:, :, -1:], key, value, None)
            one, _ = attend(Layer(is_causal=True), *last, **options)
            torch.testing.assert_close(one, attend(Layer(is_causal=False), *last, **options)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_a_mask_of_another_dtype(dtype: torch.dtype) -> None:
    call = qkv()
    wanted, _ = attend(Layer(), *call, padded(torch.float32))
    torch.testing.assert_close(attend(Layer(), *call, padded(dtype))[0], wanted)


def test_no_mask_that_may_mean_two_things() -> None:
    """Nothing is hidden under "eager"; of a model that runs with SDPA it may be the causal mask that is left out."""
    for layer in (Layer(), Layer(transformers.GptOssConfig, is_causal=True), torch.nn.Module()):
        with pytest.raises(ValueError, match=f"{type(layer).__name__} got no mask and"):
            attend(layer, *qkv(), None)
    out, _ = attend(Layer(transformers.GptOssConfig, is_causal=False), *qkv(), None)
    assert out.shape == (B, M, H, D)


@pytest.mark.parametrize("keyword", ["indices", "block_indices"])
def test_sparse_attention_is_refused(keyword: str) -> None:
    with pytest.raises(ValueError, match=f"sparse attention \\({keyword}\\)"):
        attend(Layer(), *qkv(), padded(), **{keyword: torch.zeros(B, M, 2, dtype=torch.long)})
    attend(Layer(), *qkv(), padded(), **{keyword: None})


def test_dropout_is_for_training() -> None:
    query, key, _ = qkv()
    value = torch.eye(N).expand(B, KH, N, N)  # the result is the weights
    for options in ({}, {"softcap": 2.0}, {"s_aux": torch.randn(H)}, {"position_bias": torch.randn(1, H, M, N)}):
        layer, mask = Layer().eval(), padded()
        whole, _ = attend(layer, query, key, value, mask, **options)
        assert torch.equal(attend(layer, query, key, value, mask, dropout=0.5, **options)[0], whole)
        dropped, _ = attend(layer.train(), query, key, value, mask, dropout=0.5, **options)
        seen = mask.any(-1).expand(B, H, M).transpose(1, 2)
        kept = dropped[seen] != 0
        torch.testing.assert_close(dropped[seen][kept], 2 * whole[seen][kept])
        share = kept.sum() / (whole[seen] != 0).sum()
        assert 0.3 < share < 0.7


@on_kernels
def test_which_backend_serves(tier: str) -> None:
    """What the kernels do not compute is refused where torch is forbidden, and recorded where it is not."""
    with tritune.use_backend(backend_of(tier)), record() as decisions:
        attend(Layer(), *qkv(), padded())
        attend(Layer(), *qkv(), padded(torch.float32), s_aux=torch.randn(H))
    assert [(one.op, one.backend) for one in decisions] == [("attention", backend_of(tier))] * 2
    for options, reason in (
        ({"softcap": 2.0}, "softcap=2"), ({"output_attentions": True}, "output_attentions=True"),
        ({"dropout": 0.5, "s_aux": torch.randn(H)}, "dropout=0.5 together with sinks"), ({"dropout": 0.5}, "dropout"),
    ):  # fmt: skip
        with record() as decisions:
            attend(Layer(), *qkv(), padded(), **options)
        assert [one.backend for one in decisions] == ["torch"]
        with tritune.use_backend("triton"), pytest.raises(tritune.UnsupportedError) as raised:
            attend(Layer(), *qkv(), padded(), **options)
        assert tier == "torch" or reason in str(raised.value)


def test_masks_follow_the_models_convention() -> None:
    """Boolean, and none for plain causality, for who says that it runs with SDPA; numbers and always for others."""

    def mask_of(config: Any, padding: Tensor | None = None) -> Any:
        config._attn_implementation = "tritune"
        embeds = torch.zeros(BATCH, LENGTH, 4)
        create = transformers.masking_utils.create_causal_mask
        return create(config=config, inputs_embeds=embeds, attention_mask=padding, cache=None)

    assert runs_with_sdpa(transformers.LlamaConfig)
    assert not runs_with_sdpa(transformers.GptOssConfig)
    assert not runs_with_sdpa(type("Unknown", (), {}))
    assert mask_of(transformers.LlamaConfig()) is None
    assert mask_of(transformers.LlamaConfig(), padding_mask("left")).dtype is torch.bool
    assert mask_of(transformers.GptOssConfig()).dtype is torch.float32
