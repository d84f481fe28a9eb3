"""A checkpoint under EleutherAI's lm-eval harness: texts, likelihoods, and a task of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import ROOT

from dmrl import decoding, generation, models, tokenizer
from dmrl.models import weights

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: pip install 'dmrl[eval]'", allow_module_level=True)

from dmrl import harness

LETTERS = "abcdefgh :\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights drawn wide enough that predictions differ, with their tokenizer."""
    tok = tokenizer.characters(LETTERS)
    cfg = models.Config(
        vocab_size=len(tok),
        d_model=16,
        n_layers=1,
        n_heads=2,
        n_kv_heads=2,
        mlp_hidden_size=32,
        max_sequence_length=64,
        mask_token_id=tok.mask_token_id,
        eos_token_id=tok.eos_token_id,
        dtype="float32",
        param_dtype="float32",
        remat="none",
    )
    leaves, tree = jax.tree.flatten(models.init(cfg, jax.random.key(2))["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, drawn)
    place = tmp_path_factory.mktemp("weights")
    weights.save_weights(place / "w", cfg, params)
    tok.save_pretrained(place / "w")
    return str(place / "w")


def opened(folder, **options):
    return harness.Checkpoint(folder, tokenizer=folder, **{"mc_num": 4} | options)


def ask(*args):
    return SimpleNamespace(args=args)


PROMPTS = ["abc:", "a", "hgfedcba hgfedcba hgfedcba hgfedcba:", "dd:", "abc:", "fe dc"]


def generated(model, until=(), **options):
    wanted = {"until": list(until), "max_gen_toks": 8} | options
    return model.generate_until([ask(prompt, wanted) for prompt in PROMPTS])


def completed(ready, rows, decoder):
    """What launch/generate.py would say."""
    found = generation.complete(ready, rows, decoder, 1, 6, 0)
    return [row["completion"] for lines, _ in found for row in lines]


def test_texts_are_the_sampler_s_in_the_order_of_the_requests(folder):
    model = opened(folder, batch_size=2)
    texts = generated(model)
    decoder = generation.sampling(None, 8, None, None, 0.0)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    ready = decoding.opened(folder, folder)
    for row, text in zip(rows, texts, strict=True):
        assert completed(ready, [row], decoder) == [text]
    assert len(set(texts)) >= 4
    assert texts[0] == texts[4]
    assert generated(opened(folder, batch_size=5)) == texts


def test_a_text_ends_before_the_first_of_until(folder):
    model = opened(folder, batch_size=8)
    whole = generated(model)
    marks = [text[len(text) // 2 :][:2] for text in whole if len(text) > 3][:2]
    assert len(marks) == 2
    cut = generated(model, until=marks)
    for long, short in zip(whole, cut, strict=True):
        places = [long.index(mark) for mark in marks if mark in long]
        assert short == long[: min(places, default=len(long))]
    assert cut != whole


def test_requests_may_differ_in_length_and_temperature(folder):
    model = opened(folder, batch_size=4)
    plain = generated(model)
    options = [{"max_gen_toks": 8}, {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0}]
    mixed = model.generate_until(
        [ask(prompt, options[i % 2]) for i, prompt in enumerate(PROMPTS * 2)]
    )
    assert mixed[::2] == (plain * 2)[::2]
    assert mixed[1::2] != (plain * 2)[1::2]
    assert mixed == model.generate_until(
        [ask(prompt, options[i % 2]) for i, prompt in enumerate(PROMPTS * 2)]
    )
    sampling = model._sampling({"max_gen_toks": 40})
    assert (sampling.length, sampling.steps, sampling.block_length) == (64, 32, 32)
    sampling = model._sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert (sampling.length, sampling.temperature, sampling.top_p) == (256, 0.7, 0.9)
    assert model._sampling({"temperature": 0.7}).temperature == 0
    assert opened(folder, order="random")._sampling({}).order == "random"
    with pytest.raises(ValueError, match="top_k=5: this sampler has none"):
        generated(model, do_sample=True, temperature=1.0, top_k=5)
    with pytest.raises(ValueError, match=r"no option 'nucleus'; of the sampler there are"):
        opened(folder, nucleus=0.5)


def test_one_token_s_likelihood_is_exact_whatever_surrounds_it(folder):
    model = opened(folder, mc_num=1, check_greedy=False, batch_size=3)
    pairs = [("abc", "d"), ("a", "b"), ("hgfedcba hgfedcba", "a"), ("ab ", "c")]
    found = model.loglikelihood([ask(*pair) for pair in pairs])
    tok, cfg = model.tok, model.ready.policy.model
    denoiser = models.bind(cfg, model.ready.policy.trainable)
    for (context, letter), (value, greedy) in zip(pairs[:3], found[:3], strict=True):
        ids = [*tokenizer.encode(tok, context), cfg.mask_token_id]
        hidden = denoiser.encode(jnp.array([ids]), jnp.ones((1, len(ids)), bool))
        log_p = jax.nn.log_softmax(denoiser.logits(hidden)[0, -1])
        assert value == pytest.approx(float(log_p[tok.get_vocab()[letter]]), abs=1e-4)
        assert greedy is False
    # The space belongs to the continuation, so these are two tokens.
    assert model._pair(*pairs[3]).continuation == tokenizer.encode(tok, " c")


def test_likelihoods_do_not_depend_on_the_batch_and_greedy_texts_are_known(folder):
    greedy = generated(opened(folder, steps=8, batch_size=8))
    pairs = [(prompt, text) for prompt, text in zip(PROMPTS, greedy, strict=True) if len(text) == 8]
    assert pairs
    pairs += [(prompt, text[::-1]) for prompt, text in pairs if text != text[::-1]]
    pairs.append(("abc:", "de"))
    small, large = (
        opened(folder, batch_size=n).loglikelihood([ask(*pair) for pair in pairs]) for n in (2, 32)
    )
    np.testing.assert_allclose([v for v, _ in small], [v for v, _ in large], rtol=1e-4)
    assert [same for _, same in small] == [same for _, same in large]
    truths = [
        text in greedy and (prompt, text) in zip(PROMPTS, greedy, strict=True)
        for prompt, text in pairs
    ]
    assert [same for _, same in small][:-1] == truths[:-1]
    assert all(value < 0 for value, _ in small)


def test_rolling_scores_every_token_once(folder, monkeypatch):
    model, seen = opened(folder), []

    def estimate(ready, pairs, *rest):
        seen.extend(pairs)
        return [-float(len(pair.continuation)) for pair in pairs]

    monkeypatch.setattr(harness.loglikelihood, "estimate", estimate)
    texts = ["abc", "ab cd ef gh" * 20, ""]
    assert model.loglikelihood_rolling([ask(text) for text in texts]) == [-3.0, -220.0, 0.0]
    ids = tokenizer.encode(model.tok, texts[1])
    assert [t for pair in seen[1:] for t in pair.continuation] == ids
    assert all(pair.length <= 64 for pair in seen)
    assert [len(pair.context) for pair in seen[1:4]] == [0, 32, 32]
    assert list(seen[3].context) == ids[32:64]


def test_what_does_not_fit_is_refused_or_cut(folder):
    with pytest.raises(ValueError, match="a context of 70 tokens, but there is room for 56"):
        opened(folder).generate_until([ask("a" * 70, {"max_gen_toks": 8})])
    model = opened(folder, long_prompts="cut")
    long, last = "h" * 14 + "abcdefg " * 7, "abcdefg " * 7
    texts = model.generate_until([ask(text, {"max_gen_toks": 8}) for text in (long, last)])
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="long_prompts='drop': choose one of refuse, cut"):
        opened(folder, long_prompts="drop")
    with pytest.raises(ValueError, match="continuation '' has no token to score"):
        opened(folder).loglikelihood([ask("ab", "")])
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        opened(folder).apply_chat_template([{"role": "user", "content": "a"}])


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}
metadata: {{version: 1}}
"""
GENERATE = """output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
CHOOSE = """output_type: multiple_choice
doc_to_choice: ["a", "b", "c"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
def test_the_harness_runs_a_local_task(folder, tmp_path):
    model = opened(folder)
    rows = [
        {"question": p, "answer": t} for p, t in zip(PROMPTS, generated(model, ["\n"]), strict=True)
    ]
    rows[1]["answer"] = "no"
    choices = [
        [model.loglikelihood([ask(r["question"], " " + c)])[0][0] for c in "abc"] for r in rows
    ]
    for row, values in zip(rows, choices, strict=True):
        row["label"] = int(np.argmax(values))
    rows[0]["label"] = (rows[0]["label"] + 1) % 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in (("say", GENERATE), ("choose", CHOOSE)):
        text = TASK.format(name=name, rows=tmp_path / "rows.jsonl", rest=rest)
        (tmp_path / f"{name}.yaml").write_text(text)
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "launch" / "harness.py"), "run", "--model", "dmrl"),
            *("--tasks", "say,choose", "--include_path", str(tmp_path), "--batch_size", "4"),
            *("--model_args", f"checkpoint={folder},tokenizer={folder},mc_num=4"),
            *("--output_path", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(file.read_text())["results"]
    assert found["say"]["exact_match,none"] == pytest.approx(5 / 6)
    assert found["choose"]["acc,none"] == pytest.approx(5 / 6)
