"""Packed rows stay apart: they have the loss of single rows, and every kernel the gradients of plain attention.

PyTorch's varlen attention runs only on GPUs; here the CPU's kernel with the same signature replaces it.
"""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import with_
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
)
from trl.trainer import add_fused_lm_head

from pipeline.core.files import read_json
from pipeline.params import Params
from pipeline.training.attention import (
    Kernel,
    packed_attention,
    require_isolation,
    side_by_side,
    use_packed_attention,
    varlen,
)
from pipeline.training.packing import Collate, count_tokens, pack_rows, split_batch, training_sequences
from pipeline.weights.loading import ModelError, load_base


def varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """A replacement for `torch.nn.attention.varlen.varlen_attn` of PyTorch 2.11, which has no grouped heads."""
    assert query.shape[1] == key.shape[1] and cu_seq_q.dtype is torch.int32 and window_size[1] == 0
    assert max_q == max_k == int(cu_seq_q.diff().max()) and torch.equal(cu_seq_q, cu_seq_k)
    window = None if window_size[0] < 0 else window_size[0] + 1
    return side_by_side(query, key, value, cu_seq_q, max_q, scale=scale, window=window, dropout=0.0)


def with_grouped_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *bounds: Any, enable_gqa: bool = False, **options: Any
) -> torch.Tensor:
    """A replacement for the same function of PyTorch 2.12 and later."""
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa or groups == 1
    return varlen_attn(query, *(x.repeat_interleave(groups, dim=1) for x in (key, value)), *bounds, **options)


KERNELS: dict[str, Kernel] = {
    "cpu": side_by_side,
    "varlen": partial(varlen, varlen_attn=varlen_attn),
    "varlen, grouped": partial(varlen, varlen_attn=with_grouped_heads),
}
SMALL = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
SMALL |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN: dict[str, PretrainedConfig] = {
    "llama, grouped heads": LlamaConfig(**SMALL),
    "llama, as many keys": LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "mistral, window": MistralConfig(**SMALL, sliding_window=16),
    "gemma3, window in some": Gemma3TextConfig(
        **SMALL, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
}
OTHERS: dict[str, tuple[PretrainedConfig, str]] = {
    "caps": (Gemma2Config(**SMALL, attn_logit_softcapping=1.0), "gemma2 has eager attention"),
    "sinks": (GptOssConfig(**SMALL, num_local_experts=2), "gpt_oss has eager attention"),
    "chunks": (
        Llama4TextConfig(
            **SMALL, intermediate_size_mlp=128, num_local_experts=2, moe_layers=[], attention_chunk_size=16,
            layer_types=["chunked_attention"] * 2, use_qk_norm=False,
        ),
        "llama4_text computes other values",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sequences(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A sequence of many rows of 8 tokens, and sequences with a row longer than any window here."""
    draw = torch.Generator().manual_seed(0)
    lengths = [8] * 30 + [100, 90]
    rows = [torch.randint(3, 400, (length,), generator=draw).tolist() for length in lengths]
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    pq.write_table(pa.table({"input_ids": rows, "labels": rows}), path)
    return training_sequences(path, with_(params, train={"packed_length": 100}).train)


def random_model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(deepcopy(config)).eval()  # a model changes its configuration


def logits_and_gradients(model: Any, sequences: Dataset) -> list[torch.Tensor]:
    results = []
    for sequence in sequences:
        batch = Collate(0, packed=True)([sequence])
        del batch["rows"]
        output = model(**batch, use_cache=False)
        model.zero_grad()
        output.loss.backward()
        results += [output.logits.detach(), *(p.grad.clone() for p in model.parameters())]
    return results


@pytest.mark.parametrize("name", PLAIN)
def test_every_kernel_has_the_logits_and_gradients_of_plain_attention(sequences: Dataset, name: str) -> None:
    expected = logits_and_gradients(random_model(PLAIN[name]), sequences)
    for kernel in KERNELS.values():
        model = random_model(PLAIN[name])
        assert " not " not in use_packed_attention(model, sequences, kernel)
        torch.testing.assert_close(logits_and_gradients(model, sequences), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_an_architecture_with_other_attention_keeps_it(sequences: Dataset, name: str) -> None:
    config, reason = OTHERS[name]
    for kernel in ("cpu", "varlen"):
        model = random_model(config)
        before = model.config._attn_implementation
        assert reason in use_packed_attention(model, sequences, KERNELS[kernel])
        assert model.config._attn_implementation == before


def test_a_layer_that_passes_an_unsupported_argument_is_refused_even_if_its_logits_agree(sequences: Dataset) -> None:
    """A cap of 50 changes no logit of a random model by more than rounding does."""
    model, original = random_model(PLAIN["llama, grouped heads"]), packed_attention

    def capped(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options, softcap=50.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.attention.packed_attention", capped)
        assert "its attention takes softcap" in use_packed_attention(model, sequences, KERNELS["varlen"])
    assert model.config._attn_implementation == "sdpa"


def test_attention_with_dropout_uses_only_kernels_that_have_it(sequences: Dataset) -> None:
    config = LlamaConfig(**SMALL, attention_dropout=0.1)
    assert "dropout of 0.1" in use_packed_attention(random_model(config), sequences, KERNELS["varlen"])
    assert use_packed_attention(random_model(config), sequences) == "row by row"


def test_an_architecture_that_mixes_rows_is_refused(sequences: Dataset) -> None:
    class Mixing(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **_: Any) -> Any:
            return super().forward(input_ids=input_ids, use_cache=False)

    config = PLAIN["llama, grouped heads"]
    require_isolation(random_model(config), sequences)
    needs_package = Qwen3_5TextConfig(**SMALL, layer_types=["linear_attention", "full_attention"])
    for model in (Mixing(deepcopy(config)).eval(), random_model(needs_package)):
        with pytest.raises(ModelError, match=rf"{model.config.model_type} .*train\.packing"):
            require_isolation(model, sequences)


Rows = list[dict[str, Any]]


@pytest.fixture
def rows(dataset: Path) -> Rows:
    return pq.read_table(dataset / "train.parquet", columns=["input_ids", "labels"]).to_pylist()


def test_each_row_has_the_loss_that_it_has_by_itself(dataset: Path, rows: Rows, params: Params) -> None:
    model = load_base(read_json(dataset / "contract.json")["model"], None).eval()
    sequences = training_sequences(dataset / "train.parquet", params.train).select(range(4))
    alone, in_sequence = {}, {}

    def log_probability(batch: dict[str, Any]) -> float:
        inputs = {key: value for key, value in batch.items() if key != "rows"}
        return float(model(**inputs, fused_lm_head=True).log_probs.sum())

    with torch.no_grad():
        for number in {number for sequence in sequences for number in sequence["rows"]}:
            ids, labels = (torch.tensor([rows[number][key]]) for key in ("input_ids", "labels"))
            alone[number] = float(model(input_ids=ids, labels=labels).loss)
        assert use_packed_attention(model, sequences) == "row by row"
        add_fused_lm_head(model)
        for sequence in sequences:
            batch = Collate(0, packed=True)([sequence])
            counts = {n: sum(label != -100 for label in rows[n]["labels"][1:]) for n in batch["rows"].tolist()}
            assert -log_probability(batch) == pytest.approx(sum(alone[n] * counts[n] for n in counts), rel=1e-5)
            for piece in split_batch(batch, 1000):
                [number] = piece["rows"].tolist()
                in_sequence[number] = -log_probability(piece) / counts[number]
    assert len(alone) > 8
    assert in_sequence == pytest.approx(alone, abs=1e-5)


def test_a_packed_batch_has_no_padding_and_every_batch_is_split_between_its_rows(rows: Rows) -> None:
    def packed(*numbers: int) -> dict[str, Any]:
        ids, labels = (sum((rows[n][key] for n in numbers), []) for key in ("input_ids", "labels"))
        lengths = [len(rows[n]["input_ids"]) for n in numbers]
        return {"input_ids": ids, "labels": labels, "rows": list(numbers), "seq_lengths": lengths}

    whole = Collate(0, packed=True)([packed(0, 1, 2), packed(3, 4)])
    assert count_tokens(whole) == whole["input_ids"].numel()
    for batch in (whole, Collate(0, packed=False)([rows[n] | {"rows": [n]} for n in range(5)])):
        for number in (1, 2, 3, 5, 9):
            parts = split_batch(batch, number)
            assert len(parts) == min(number, 5)
            assert [row for part in parts for row in part["rows"].tolist()] == [0, 1, 2, 3, 4]
            assert sum(map(count_tokens, parts)) == count_tokens(batch)


def test_a_row_longer_than_a_packed_sequence_is_not_cut(dataset: Path, rows: Rows, params: Params) -> None:
    sequences = training_sequences(dataset / "train.parquet", with_(params, train={"packed_length": 40}).train)
    ids = [row["input_ids"] for row in rows]
    assert sorted(n for lengths in sequences["seq_lengths"] for n in lengths) == sorted(map(len, ids))
    assert sorted(sum(sequences["input_ids"], [])) == sorted(sum(ids, []))


def test_every_row_is_in_one_sequence_and_sequences_are_full(params: Params) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in torch.randint(5, 120, (2000,), generator=draw)] + [900, 512, 513]
    sequences = pack_rows(lengths, 512, seed=1)
    assert sorted(row for rows in sequences for row in rows) == list(range(len(lengths)))
    totals = [sum(lengths[row] for row in rows) for rows in sequences]
    assert all(total <= 512 or len(rows) == 1 for total, rows in zip(totals, sequences, strict=True))
    assert sum(totals) / len(totals) > 0.95 * 512
    assert sequences != pack_rows(lengths, 512, seed=2)
