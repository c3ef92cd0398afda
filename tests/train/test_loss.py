"""The loss: equal to the plain one, and blind to what packing puts beside a document."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from fixtures import make_model
from lacuna.data.collate import collate
from lacuna.data.samples import Sample
from lacuna.errors import ModelError
from lacuna.train.loss import chunked_cross_entropy
from lacuna.train.model import LossModel, prove_loss


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
    return functional.cross_entropy(hidden.float() @ weight.float().T, targets, reduction="sum") * scale


@pytest.mark.parametrize("vocabulary", [11, 2**18])
def test_chunked_loss_and_gradients_equal_the_plain_ones(vocabulary: int) -> None:
    """300 tokens take two chunks, the second one short.

    The loss is held against fp64: of 2^18 words torch's own in fp32 is off by 5e-7 with AVX-512, by 1.2e-6 without.
    """
    torch.manual_seed(0)
    hidden = torch.randn(300, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    targets = torch.randint(vocabulary, (300,))
    ours = chunked_cross_entropy(hidden, weight, targets, 1 / 300, torch.float32)
    our_gradients = torch.autograd.grad(ours * 3, (hidden, weight))
    theirs = plain(hidden, weight, targets, 1 / 300)
    their_gradients = torch.autograd.grad(theirs * 3, (hidden, weight))
    with torch.no_grad():
        exact = functional.cross_entropy(hidden.double() @ weight.double().T, targets)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-7, atol=0)
    for our, their in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=2e-6)


def test_chunked_loss_in_bf16_adds_up_in_fp32() -> None:
    """torch's own linear_cross_entropy returns 8.5 instead of 9.03 here: it adds bf16 losses in bf16."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3000, 64), torch.randn(8192, 64) / 8
    targets = torch.randint(8192, (3000,))
    ours = chunked_cross_entropy(hidden, weight, targets, 1 / 3000, torch.bfloat16)
    theirs = plain(hidden.bfloat16(), weight.bfloat16(), targets, 1 / 3000)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def test_a_frozen_head_gets_no_gradient_and_no_buffer() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
    chunked_cross_entropy(hidden, weight, torch.arange(5), 1.0, torch.float32).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_targets_give_zero_loss_and_zero_gradients() -> None:
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.long), 1.0, torch.float32)
    loss.backward()
    assert loss == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def token_losses(model: LossModel, rows: list[list[Sample]], flatten: bool = False) -> list[float]:
    """The loss of every target on its own, in the order of the rows."""
    micro = collate(rows, 3, None, flatten)
    ids, positions = torch.from_numpy(micro.input_ids), torch.from_numpy(micro.position_ids)
    predicting, targets = torch.from_numpy(micro.predicting), torch.from_numpy(micro.targets)
    with torch.no_grad():
        return [float(model(ids, positions, predicting[[i]], targets[[i]], 1.0)) for i in range(len(targets))]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_packed_rows_have_the_losses_of_documents_alone(
    tmp_path_factory: pytest.TempPathFactory, attention: str, kind: str, training: bool, flatten: bool
) -> None:
    folder = make_model(tmp_path_factory.mktemp(kind), kind)
    causal_lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    model = LossModel(causal_lm, torch.float32).train(training)
    generator = np.random.default_rng(0)
    documents = [
        Sample(generator.integers(5, 400, length).astype(np.int32), generator.random(length) < 0.7)
        for length in (9, 17, 2, 30, 5, 1, 12)
    ]
    rows = [documents[:3], documents[3:5], documents[5:]]
    alone = [loss for document in documents for loss in token_losses(model, [[document]])]
    packed = token_losses(model, rows, flatten)
    assert len(packed) == sum(int(document.supervised[1:].sum()) for document in documents) > 20
    np.testing.assert_allclose(packed, alone, atol=1e-5)


def test_the_proof_accepts_a_right_model_and_finds_a_leak(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_model(tmp_path_factory.mktemp("leak"))
    model = LossModel(AutoModelForCausalLM.from_pretrained(folder), torch.float32)
    assert prove_loss(model.causal_lm, flatten_rows=False, packing=True)

    class Leaky(type(model.causal_lm)):  # type: ignore[misc]
        """An architecture that pays no attention to restarting positions."""

        def forward(self, position_ids: torch.Tensor, **rest: object) -> object:
            return super().forward(**rest)

    leaky = LossModel(Leaky.from_pretrained(folder), torch.float32)
    with pytest.raises(ModelError, match=r"lets packed documents see each other.*--packing false"):
        prove_loss(leaky.causal_lm, flatten_rows=False, packing=True)
    prove_loss(leaky.causal_lm, flatten_rows=False, packing=False)


def test_a_model_that_scales_its_logits_gets_the_plain_loss(tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = CohereConfig(**shape, num_attention_heads=2, num_key_value_heads=2, logit_scale=0.25)
    torch.manual_seed(0)
    model = LossModel(CohereForCausalLM(config), torch.float32)
    model.chunked = prove_loss(model.causal_lm, flatten_rows=False, packing=True)
    assert not model.chunked
    ids = torch.arange(12)[None]
    expected = model.causal_lm(ids, labels=ids, use_cache=False).loss
    positions, predicting = torch.arange(12)[None], torch.arange(11)
    torch.testing.assert_close(model(ids, positions, predicting, ids[0, 1:], 1 / 11), expected)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soft_cap_is_seen_also_where_fresh_weights_hide_it(dtype: torch.dtype) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    for cap, plain_head in ((30.0, False), (None, True)):
        torch.manual_seed(0)
        causal_lm = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=cap))
        assert prove_loss(causal_lm, flatten_rows=False, packing=True) is plain_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bloom", "lfm2", "opt"])
def test_architectures_that_leak_are_found_with_fresh_weights(kind: str, dtype: torch.dtype) -> None:
    """ALiBi over the whole row, a convolution across documents, positions counted by the model itself."""
    from transformers import BloomConfig, Lfm2Config, OPTConfig

    configs = {
        "bloom": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        "lfm2": Lfm2Config(**{**SMALL, "num_hidden_layers": 3}, full_attn_idxs=[2]),
        "opt": OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                         word_embed_proj_dim=32, max_position_embeddings=64),
    }  # fmt: skip
    torch.manual_seed(0)
    model = LossModel(AutoModelForCausalLM.from_config(configs[kind]), dtype)
    with pytest.raises(ModelError, match="lets packed documents see each other"):
        prove_loss(model.causal_lm, flatten_rows=False, packing=True)
