"""The example and training scripts as their users run them, 2 processes each; losses do not depend on how the table is sharded."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_interactions import write_interactions

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "megatron"
CHECKOUT = os.environ.get("MEGATRON_LM_PATH")
GPT = shlex.split(
    """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-iters 10
    --lr-warmup-fraction 0.1 --mock-data --tokenizer-type NullTokenizer --vocab-size 50 --split 1,0,0 --eval-iters
    0 --eval-interval 1000 --log-interval 1 --transformer-impl local --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion
    --no-rope-fusion --use-cpu-initialization --hidden-dropout 0 --attention-dropout 0 --distributed-backend gloo
    --position-embedding-type rope --inference-rng-tracker --num-workers 0 --untie-embeddings-and-output-weights
    """
)
training = pytest.mark.skipif(
    CHECKOUT is None and find_spec("megatron.training") is None,
    reason="not run: pretrain() of megatron.training, which this wheel lacks; MEGATRON_LM_PATH would name a checkout of Megatron-LM",
)
checkout = pytest.mark.skipif(
    CHECKOUT is None, reason="not run: Megatron-LM's own pretrain_gpt.py; MEGATRON_LM_PATH would name a checkout of it"
)


def run(*command: str | Path) -> str:
    """What the command printed."""
    path = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join([CHECKOUT, *path] if CHECKOUT else path),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def on(processes: int, script: str | Path, *arguments: str | Path) -> str:
    launcher = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    return run(*launcher, str(processes), script, *arguments)


def on_one(script: str | Path, *arguments: str | Path) -> str:
    return on(1, script, *arguments)


def on_two(script: str | Path, *arguments: str | Path) -> str:
    return on(2, script, *arguments)


def losses(output: str) -> list[float]:
    found = re.findall(r"(?:lm loss: |iteration +\d+  loss )(\S+)", output)
    assert len(found) >= 3, output[-3000:]
    return [float(loss) for loss in found]


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_pretrain_gpt_on_core_alone(objective: str) -> None:
    script, options = EXAMPLES / "pretrain_gpt.py", ["--core", "--ta-objective", objective]
    options += ["--train-iters", "20", "--seq-length", "64", "--hidden-size", "32"]
    whole = losses(on_two(script, *options, "--ta-ssp-size", "1"))
    assert losses(on_two(script, *options, "--ta-ssp-size", "2")) == pytest.approx(whole, abs=1e-4)  # as printed
    assert whole[-1] < whole[0] - 1


KEYED = ["--ta-token-keyed-every", "2", "--ta-window", "8"]


def test_pretrain_gpt_with_token_keyed_layers() -> None:
    command = [EXAMPLES / "pretrain_gpt.py", "--core", *KEYED, "--train-iters", "20"]
    command += ["--seq-length", "64", "--hidden-size", "32"]
    whole = losses(on_one(*command))
    assert whole[-1] < whole[0] - 1
    parts = losses(on(4, *command, "--tensor-model-parallel-size", "2", "--context-parallel-size", "2"))
    assert parts == pytest.approx(whole, abs=1e-3)  # as printed


def test_what_token_keyed_layers_do_not_cover_is_refused() -> None:
    with pytest.raises(AssertionError, match="--ta-ssp-size is 2 with --ta-token-keyed-every 2"):
        on_two(EXAMPLES / "pretrain_gpt.py", "--core", *KEYED, "--ta-ssp-size", "2")


def test_one_node_ranks_held_out_items(tmp_path: Path) -> None:
    inter = write_interactions(tmp_path / "small.inter")
    command = ("bash", EXAMPLES / "one_node.sh", "--inter", inter, "--train-iters", "60", "--micro-batch-size", "8")
    printed = run(*command)
    assert losses(printed)[-1] < losses(printed)[0]
    popularity, model = re.findall(r"held-out items, by .*ndcg@10 (\S+)", printed)
    assert float(model) > float(popularity) > 0


@training
@pytest.mark.newest
@pytest.mark.parametrize("objective, other", [("next", []), ("masked", ["--use-distributed-optimizer"])])
def test_pretrain_gpt_through_megatron_training(objective: str, other: list[str]) -> None:
    options = [EXAMPLES / "pretrain_gpt.py", *GPT, "--ta-objective", objective]
    whole = losses(on_two(HERE / "run_script.py", *options, "--ta-ssp-size", "1"))
    assert len(whole) == 4 and whole[0] != whole[-1]
    assert losses(on_two(HERE / "run_script.py", *options, "--ta-ssp-size", "2", *other)) == pytest.approx(
        whole, abs=1e-5
    )


@training
@pytest.mark.newest
def test_token_keyed_layers_through_megatron_training() -> None:
    printed = losses(on_two(HERE / "run_script.py", EXAMPLES / "pretrain_gpt.py", *GPT, *KEYED))
    assert len(printed) == 4 and printed[-1] < printed[0] - 0.1


@training
@pytest.mark.newest
def test_pretrain_gpt_with_pipeline_stages() -> None:
    options = [EXAMPLES / "pretrain_gpt.py", *GPT, "--ta-objective", "masked", "--pipeline-model-parallel-size", "2"]
    assert len(losses(on_two(HERE / "run_script.py", *options))) == 4


@training
@pytest.mark.newest
def test_tokenized_layers_below_a_causal_model_are_refused() -> None:
    with pytest.raises(AssertionError, match="would show each position the token it shall predict"):
        on_two(HERE / "run_script.py", EXAMPLES / "pretrain_gpt.py", *GPT, "--ta-tokenized-layers", "1")


@checkout
@pytest.mark.newest
def test_spec_serves_the_unmodified_pretrain_gpt() -> None:
    script = Path(str(CHECKOUT)) / "pretrain_gpt.py"
    options = [script, *GPT, "--no-rope-freq", "([1]+[0]*1)"]
    spec = ["--spec", "ta_plugin.megatron.layer_specs", "causal_layer_spec"]
    stock = losses(on_two(HERE / "run_script.py", *options))
    assert losses(on_two(HERE / "run_script.py", *options, *spec)) == pytest.approx(stock, abs=1e-5)
    with pytest.raises(AssertionError, match=r"attention_dropout is 0\.1"):  # the spec is what ran
        on_two(HERE / "run_script.py", *options, *spec, "--attention-dropout", "0.1")
