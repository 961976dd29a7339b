"""The training loop: batches in, metrics and checkpoints out, stoppable and resumable at any point."""

import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint import CheckpointError, CheckpointStore
from moe_jax.config import ConfigError, Problem, ResolvedRun, check_run, to_dict
from moe_jax.config.render import to_yaml
from moe_jax.config.schema import RunConfig
from moe_jax.deployments import create
from moe_jax.train.corpus import check_same_text, load_corpus, unigram_entropy_nats
from moe_jax.train.data import TrainData, held_out_batches
from moe_jax.train.diagnose import diagnose
from moe_jax.train.metrics import MetricsWriter, ProgressDisplay, worst_over_mean
from moe_jax.train.rundir import CHECKPOINTS, check_same_run, locked_run_dir, write_run_files
from moe_jax.train.signals import StopRequest
from moe_jax.train.step import State, Trainer
from moe_jax.train.tokenizer import create_tokenizer

# Steps dispatched but not yet waited for. XLA:CPU deadlocks with 32; few are enough to keep devices busy.
MAX_STEPS_IN_FLIGHT = 4


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it failed and what to try."""


def run(cfg: RunConfig, provenance: Mapping[str, str]) -> int:
    """Train as the config says; resumes from the newest checkpoint of the run folder.

    provenance: where each config value came from, written into config.yaml. Returns the process's exit code:
    0 when complete, 128 + n when signal n ended it (saved first), 1 when a step was not finite or a
    checkpoint could not be read or written (the last line on stderr says which).
    Raises ConfigError, before anything is compiled or written over, when the run cannot start.
    """
    check_run(cfg)
    with locked_run_dir(cfg.train.run_dir) as folder, StopRequest() as stop:
        try:
            with CheckpointStore(folder / CHECKPOINTS, cfg.train.keep_checkpoints) as store:
                _Training(cfg, provenance, folder, store, stop).run()
        except (TrainingError, CheckpointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return stop.exit_code


@dataclass
class _Pending:
    """A step under way."""

    step: int
    metrics: dict[str, jax.Array]


class _Training:
    def __init__(
        self,
        cfg: RunConfig,
        provenance: Mapping[str, str],
        folder: Path,
        store: CheckpointStore,
        stop: StopRequest,
    ):
        self.cfg, self.folder, self.store, self.stop = cfg, folder, store, stop
        latest = self._check_resume()
        self.tokenizer = create_tokenizer(cfg.data.tokenizer, cfg.model.vocab_size)
        self.corpus = load_corpus(cfg.data, self.tokenizer)
        if latest is not None:
            check_same_text(store.meta(latest)["data"], self.corpus)
        tokens, length, size = self.corpus.train_tokens, cfg.data.seq_len, cfg.train.batch_size
        self.data = TrainData(tokens, length, size, cfg.train.seed)
        self.held_out = []
        if cfg.train.eval_every:
            self.held_out = held_out_batches(
                self.corpus.held_out_tokens, length, size, cfg.train.eval_batches
            )
        deployment = create(cfg.model, cfg.deployment, zero_params=cfg.train.zero_params)
        self.trainer = Trainer(deployment, cfg.train)
        # From here on things are written: all that the config could have wrong is known.
        write_run_files(folder, to_yaml(ResolvedRun(cfg, provenance)))
        if cfg.data.tokenizer != "bytes":
            shutil.copyfile(cfg.data.tokenizer, folder / "tokenizer.json")
        self.state = self._restore(latest)
        self.step = latest or 0
        self.saved_step = latest
        self.pending: deque[_Pending] = deque()
        self.entropy = unigram_entropy_nats(self.corpus.train_tokens)
        self.last_report = time.perf_counter()

    def _check_resume(self) -> int | None:
        """The step to resume from, None to start afresh; refuses what does not go together."""
        latest = self.store.latest_step()
        if latest is None:
            return None
        if not self.cfg.train.resume:
            allowed = f"holds checkpoints up to step {latest}, and train.resume is false"
            raise ConfigError(
                Problem("train.run_dir", self.cfg.train.run_dir, allowed, "use another folder, or resume")
            )
        check_same_run(self.store.meta(latest)["config"], self.cfg, self.store.directory)
        return latest

    def _restore(self, latest: int | None) -> State:
        if latest is None:
            return self.trainer.init_state()
        return self.store.restore(latest, self.trainer.abstract_state())

    # ---- the loop ----------------------------------------------------------------------------------------

    def run(self) -> None:
        cfg = self.cfg.train
        with (
            MetricsWriter(self.folder) as self.metrics,
            ProgressDisplay(cfg.steps, self.step) as self.display,
        ):
            self._greet()
            while self.step < cfg.steps and not self.stop.signal:
                self.state, metrics = self.trainer.step(self.state, self.data.batch(self.step))
                self.step += 1
                self.pending.append(_Pending(self.step, metrics))
                self._drain(MAX_STEPS_IN_FLIGHT)
                if cfg.eval_every and self.step % cfg.eval_every == 0:
                    self._evaluate()
                if self.step % cfg.checkpoint_every == 0:
                    self._save()
            self._save()
            self.store.wait()
            if self.stop.signal:
                name = self.stop.signal.name
                self.display.say(f"{name}: saved step {self.step}; the same command goes on from there")

    def _greet(self) -> None:
        deployment = self.cfg.deployment
        self.display.say(f"text: {self.corpus.describe()}")
        self.display.say(
            f"unigram entropy of the text: {self.entropy:.4f} nats (a model that sees no context)"
        )
        start = "fresh weights" if self.saved_step is None else f"resumed from step {self.saved_step}"
        self.display.say(
            f"{deployment.name} on {deployment.num_devices} devices, {start}; writes {self.folder}"
        )

    def _drain(self, keep: int) -> None:
        """Wait for the steps under way but the newest ``keep``; report them; stop at one not finite."""
        while len(self.pending) > keep:
            done = self.pending.popleft()
            values = jax.device_get(done.metrics)
            now = time.perf_counter()
            tokens_per_s = (
                self.cfg.train.batch_size * self.cfg.data.seq_len / max(now - self.last_report, 1e-9)
            )
            self.last_report = now
            report = done.step % self.cfg.train.log_every == 0 or done.step == self.cfg.train.steps
            if report or not values["finite"]:
                self._write("train", done.step, values | {"tokens_per_s": tokens_per_s})
            if not values["finite"]:
                raise TrainingError(self._explain(done.step, values))
            self.display.step(done.step, values, tokens_per_s, report)

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        loads = values.get("tokens_per_expert_NE")
        balance = {} if loads is None else {"expert_load_worst_over_mean": worst_over_mean(loads)}
        self.metrics.write(kind, step, values | balance)

    def _evaluate(self) -> None:
        self._drain(0)
        results = [self.trainer.evaluate(self.state["params"], batch) for batch in self.held_out]
        values = jax.device_get(results)
        means = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
        self._write("eval", self.step, means)
        held_out = f"held-out loss {means['loss']:.4f} (cross-entropy {means['cross_entropy']:.4f} nats; "
        self.display.say(f"step {self.step}: {held_out}unigram entropy {self.entropy:.4f})")
        self.last_report = time.perf_counter()

    def _save(self) -> None:
        self._drain(0)  # a step is saved only once it is known to be finite
        if self.step != self.saved_step:
            self.store.save(self.step, self.state, self._meta())
            self.saved_step = self.step
            self.last_report = time.perf_counter()

    def _meta(self) -> dict[str, Any]:
        return {
            "config": to_dict(self.cfg),
            "data": self.corpus.identity(),
            "data_position": {"next_batch": self.step, "seed": self.cfg.train.seed},
            "tokenizer": self.tokenizer.to_json(),
        }

    def _explain(self, step: int, values: dict[str, Any]) -> str:
        """Why a step was refused; its weights are untouched, so the batch can be run again with probes."""
        began = diagnose(self.trainer, self.state["params"], self.data.batch(step - 1))
        self.store.wait()  # the newest save may be under way
        steps = self.store.steps()
        good = f"step {steps[-1]} in {self.store.directory}" if steps else "none was saved yet"
        return (
            f"step {step} is not finite (loss {float(values['loss'])}, gradient norm "
            f"{float(values['grad_norm'])}); it began {began}. The update was not made. "
            f"Last good checkpoint: {good}. Try a lower train.learning_rate, a longer train.warmup_steps, "
            f"a smaller train.clip_norm, or compute in float32"
        )
