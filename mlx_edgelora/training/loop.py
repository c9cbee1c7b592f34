"""The training loop: mlx_lm's schedule of steps, validations, reports and saves.

It differs from `mlx_lm.tuner.trainer.train` on purpose:
- the reported training loss is the mean over the tokens since the last report, not the mean of
  the batches' means, and the speed of a short last window is computed from its own length;
- accumulated gradients are averaged over the labelled tokens of all batches, as in one batch of
  all their rows, and not over batches;
- the last `iters % grad_accumulation_steps` batches are applied too, as their own mean;
- every validation uses the same batches, in evaluation mode and with exact sums;
- a loss or gradient that is not finite ends the run before a parameter changes;
- with `max_grad_norm` the mean of the accumulated gradients is clipped by its global norm;
- the caller seeds the random key (dropout, LoRA initialisation) before the adapters are made;
  `config.seed` only decides the order of batches here.
"""

import contextlib
import itertools
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data.batches import Batch, count_batches, iterate_batches
from mlx_edgelora.data.dataset import Dataset
from mlx_edgelora.engine.adapter_state import Arrays
from mlx_edgelora.engine.finite import Magnitudes
from mlx_edgelora.engine.optimizer import clip_factor
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import peak_memory, recent_peak
from mlx_edgelora.measure.profile import begin_step, phase
from mlx_edgelora.storage.files import make_folder
from mlx_edgelora.training.adapters import WEIGHTS_FILE, save_adapters
from mlx_edgelora.training.callbacks import StepCallback, TrainingCallback
from mlx_edgelora.training.checkpoints import (
    BEST_FOLDER,
    FOLDER,
    NUMBERED_FILES,
    Origin,
    RunState,
    remove_old,
    save_checkpoint,
)
from mlx_edgelora.training.evaluate import GradientEngine, evaluate, limit_cache, rewards
from mlx_edgelora.training.failures import explain
from mlx_edgelora.training.log import RunLog
from mlx_edgelora.training.progress import Progress
from mlx_edgelora.training.report import LossReport, UsageMeter, Window
from mlx_edgelora.training.sharing import SharedSums, Shares
from mlx_edgelora.training.stopping import Stopped, StopRequests, stop_requests
from mlx_edgelora.training.text import abbreviate


@dataclass(frozen=True)
class TrainResult:
    """Results of a run.

    Attributes:
        iterations: number of finished steps.
        train_loss: last reported training loss.
        val_loss: loss of the last validation, before the last step; None without validation.
        trained_tokens: labelled tokens over all steps.
        peak_memory_bytes: peak memory of MLX's allocator.
        adapter_path: folder of the adapter.
    """

    iterations: int
    train_loss: float
    val_loss: float | None
    trained_tokens: int
    peak_memory_bytes: int
    adapter_path: Path


def train(
    engine: GradientEngine,
    optimizer: optimizers.Optimizer,
    config: TrainConfig,
    train_set: Sequence,
    valid_set: Sequence | None = None,
    callbacks: Sequence[TrainingCallback] = (),
    progress: Progress | None = None,
    origin: Origin | None = None,
    log: RunLog | None = None,
) -> TrainResult:
    """Train the model's trainable parameters for `config.iters` steps.

    Args:
        engine: computes losses and gradients; its model stays in training mode.
        optimizer: an optimizer of `build_optimizer`.
        config: options of the run.
        train_set: training rows, for `iterate_batches`.
        valid_set: validation rows, for `iterate_batches`; None without validation.
        callbacks: called with every report. If a callback raises, the steps since the last save
            are saved and the exception is raised again.
        progress: replaces the display on standard output and error.
        origin: the checkpoint to resume from, whose weights the engine has, and facts about the
            run for new checkpoints.
        log: gets a record of every report.

    Returns:
        Results of the run.

    Raises:
        EdgeLoraError: a loss or gradient is NaN or infinite, or a file cannot be written; the
            last saved adapter is unchanged. Or memory or the GPU's time ran out; the steps since
            the last save are then saved if possible.
        Stopped: a signal ended the run; all steps are saved.
    """
    origin = origin or Origin()
    with contextlib.ExitStack() as stack:
        own = Progress(
            config.iters,
            verbose=config.verbose,
            silent=not origin.group.leads,
            has_rewards=config.compares_answers,
        )
        progress = stack.enter_context(progress or own)
        run = _Run(
            engine,
            optimizer,
            config,
            train_set,
            callbacks,
            progress,
            log,
            origin,
        )
        validates = valid_set and config.val_batches != 0
        engine.model.train()
        first = run.resumed() + 1
        batches = iterate_batches(
            train_set,
            config.batch_size,
            config.max_seq_length,
            loop=True,
            seed=config.seed,
            packing=config.packing,
        )
        batches = itertools.islice(batches, first - 1, None)
        requests = run.requests = stack.enter_context(stop_requests(config.max_time))
        iteration = first - 1
        try:
            run.between_steps(iteration)
            for iteration, batch in zip(range(first, config.iters + 1), batches, strict=False):
                if validates and run.is_due(config.steps_per_eval, iteration, first=True):
                    run.validate(iteration, valid_set)
                run.step(iteration, batch)
                run.between_steps(iteration)
                if run.is_due(config.steps_per_report, iteration):
                    run.report(iteration)
                if run.is_due(config.save_every, iteration):
                    run.save(numbered=iteration % config.save_every == 0)
                if run.must_stop:
                    run.end_early(requests)
                    break
        except Stopped:
            raise
        except KeyboardInterrupt:
            progress.note(f"interrupted; {run.last_saved_message()}")
            raise
        except (RuntimeError, MemoryError) as error:
            if (message := explain(error)) is None:
                raise
            raise EdgeLoraError(f"step {iteration}: {message}; {run.save_unsaved()}") from error
        except BrokenPipeError:
            run.save_unsaved()
            raise
        except OSError as error:  # errors of this package's files are EdgeLoraErrors already
            raise EdgeLoraError(
                f"step {iteration}: standard output cannot be written ({error.strerror}); "
                f"{run.save_unsaved()}"
            ) from error
    return run.result()


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self, engine, optimizer, config, train_set, callbacks, progress, log, origin
    ) -> None:
        self.requests: StopRequests | None = None
        self._group = origin.group
        self._shares = Shares(origin.group, config.batch_size, config.balance)
        self._stopped_elsewhere = False  # a process of the group was asked to stop
        self._engine = engine
        self._optimizer = optimizer
        self._config = config
        self._train_set = train_set
        self._callbacks = callbacks
        self._progress = progress
        self._log = log
        self._origin = origin
        self._folder = Path(config.adapter_path)
        if self._group.leads:
            make_folder(self._folder)
        self._working_folder = os.getcwd()
        self._meter = UsageMeter(engine.disk)
        self._window = Window(self._meter)
        self._adapters = engine.adapters
        self._adapters.start(optimizer)
        self._shared = SharedSums(engine.adapters, engine.model, origin.group)
        self._magnitudes = Magnitudes()
        self._grad_norm: float | None = None  # norm before clipping at the last update
        self._weights = 0.0  # sum of the weights of the accumulated gradients
        self._first_terms = 0  # terms of the loss of the first accumulated batch
        self._weight = 1.0  # weight of the current batch
        self._is_last = False  # whether no rows of this process follow before the update
        self._trained_tokens = 0
        self._iteration = 0
        self._between = True  # whether no step is in progress
        self._key = mx.random.state[0]
        self._updated = 0  # last step that changed the parameters
        self._saved = 0  # last step whose parameters are on disk
        self._replaced: set[str] = set()  # patterns whose files are all of this run
        self._last: dict[str, float] = {}
        self._best: float | None = None  # lowest validation loss

    def resumed(self) -> int:
        """Restore the state of the checkpoint to resume from; returns its step, 0 without one."""
        checkpoint = self._origin.checkpoint
        if checkpoint is None:
            return 0
        state = checkpoint.state
        checkpoint.restore(self._adapters, self._optimizer)
        self._key = mx.random.state[0]
        self._weights, self._first_terms = state.accumulated, state.first_tokens
        self._trained_tokens = state.trained_tokens
        self._iteration = self._updated = self._saved = state.step
        losses = {"train_loss": state.train_loss, "val_loss": state.val_loss}
        self._last = {name: loss for name, loss in losses.items() if loss is not None}
        self._best = state.best_val_loss
        self._progress.note(f"resumed after step {state.step} from {checkpoint.folder}")
        return state.step

    def is_due(self, every: int, iteration: int, first: bool = False) -> bool:
        """Whether a step is a multiple of `every` or the last one, or with `first` the first."""
        return (
            iteration % every == 0 or iteration == self._config.iters or (first and iteration == 1)
        )

    def step(self, iteration: int, batch: Batch) -> None:
        """Compute one batch: its loss, its gradients and, when one is due, the update."""
        begin_step()
        start = time.perf_counter()
        self._between = False
        terms, pieces = batch.terms, self._shares.pieces(batch)
        # Numbers of tokens as weights could overflow gradients in 16 bits.
        if not self._weights:
            self._first_terms = terms
        is_due = self.is_due(self._config.grad_accumulation_steps, iteration)
        loss = self._backward_of_all(iteration, pieces, terms, is_due)
        self._weights += terms / max(1, self._first_terms)
        if is_due:
            self._update(iteration)
            self._updated = iteration
        self._iteration, self._key, self._between = iteration, mx.random.state[0], True
        limit_cache(self._engine, self._config)
        tokens = int(batch.mask.sum())
        self._trained_tokens += tokens
        figures = rewards(self._engine, self._group)
        seconds = time.perf_counter() - start
        self._window.add(loss, tokens, seconds, terms, figures)
        self._progress.step(self._make_report("train_loss", self._window, iteration))

    def _backward_of_all(
        self, iteration: int, pieces: list[Batch], terms: int, is_due: bool
    ) -> float:
        """Compute a batch together with the other processes; returns its mean loss.

        Args:
            iteration: the step.
            pieces: rows of this process.
            terms: terms of the loss of the whole batch (`Batch.terms`).
            is_due: whether an update follows.
        """
        if is_due:
            self._shared.begin()
        finish, speeds = self._shared.finish, self._shares.speeds
        with self._group.failing_together(2 + len(speeds()), finish), self._shares.timed(pieces):
            loss = self._backward(iteration, pieces, terms, is_due)
        finish()
        own = [loss, self._is_asked_to_stop, *speeds()]
        loss, stops, *measured = self._group.exchange(own)
        self._shares.measured(measured)
        self._stopped_elsewhere = bool(stops) and self._group.size > 1
        return loss

    def _backward(self, iteration: int, pieces: list[Batch], terms: int, is_due: bool) -> float:
        """Compute this process's rows; returns their part of the batch's mean loss."""
        total = 0.0
        for piece in pieces:
            own = piece.terms
            self._weight = own / max(1, self._first_terms)
            self._is_last = is_due and piece is pieces[-1]
            loss, _ = self._engine.backward(piece, self._add_gradients)
            loss = loss.item()
            self._check_finite(iteration, piece, loss, self._magnitudes)
            total += loss * (own / terms)
        return total

    @property
    def _is_asked_to_stop(self) -> bool:
        requests = self.requests
        return requests is not None and (requests.signal is not None or requests.time_is_over)

    @property
    def must_stop(self) -> bool:
        """Whether the run ends after this step; all processes of a group end after the same one."""
        return self._is_asked_to_stop if self._group.size == 1 else self._stopped_elsewhere

    def _add_gradients(self, gradients: Arrays) -> None:
        """Add weighted gradients to the sum, and record the sum's magnitude."""
        if self._weight != 1:
            for name in list(gradients):
                gradients[name] = self._weight * gradients.pop(name)
            mx.eval(gradients)
        names = list(gradients)  # the next call empties it
        self._adapters.add(gradients, self._magnitudes.add)
        if self._is_last and self._engine.in_last_part:
            self._shared.add(names)

    def _update(self, iteration: int) -> None:
        weights, self._weights = self._weights, 0.0
        magnitudes = self._magnitudes
        if self._group.size > 1:
            magnitudes = self._shared.magnitudes
            self._check_finite(iteration, None, 0.0, magnitudes)
        norm = magnitudes.norm()
        self._grad_norm = None if norm is None else norm / weights
        self._magnitudes.clear()
        with phase("update"):
            self._adapters.update(self._optimizer, weights, self._clipping(iteration, weights))

    def _clipping(self, iteration: int, weights: float) -> mx.array | None:
        """The factor that clips the mean of the gradients; None without `max_grad_norm`."""
        if self._config.max_grad_norm is None:
            return None
        norm = self._adapters.norm(weights)
        if not math.isfinite(norm.item()):
            raise EdgeLoraError(
                f"step {iteration}: the norm of the gradients is {norm.item()}, expected a finite "
                f"number; lower the learning rate; {self.last_saved_message()}"
            )
        return clip_factor(norm, self._config.max_grad_norm)

    def between_steps(self, iteration: int) -> None:
        """Call the callbacks that wait for the end of a step."""
        with self._saved_on_failure():
            for callback in self._callbacks:
                if isinstance(callback, StepCallback):
                    callback.on_step(iteration, self._progress.note)

    def report(self, iteration: int) -> None:
        """Report the training loss since the last report."""
        report = self._make_report("train_loss", self._window, iteration)
        self._publish(report)
        if (news := self._shares.news()) is not None:
            self._progress.note(news)
        self._window = Window(self._meter)

    def validate(self, iteration: int, valid_set: Sequence) -> None:
        """Report the validation loss before the step `iteration`."""
        config, window = self._config, Window(self._meter)
        total = count_batches(
            valid_set,
            config.batch_size,
            config.max_seq_length,
            seed=config.seed,
            packing=config.packing,
        )
        if config.val_batches != -1:
            total = min(total, config.val_batches)
        start = time.perf_counter()
        with self._progress.validation(total) as advance:
            loss, tokens = evaluate(
                self._engine, valid_set, config, config.val_batches, advance, self._group
            )
        if not math.isfinite(loss):
            raise EdgeLoraError(
                f"step {iteration}: validation loss is {loss}, expected a finite number; "
                f"lower the learning rate; {self.last_saved_message()}"
            )
        seconds, figures = time.perf_counter() - start, rewards(self._engine, self._group)
        window.add(loss, tokens, seconds, figures=figures)
        is_best = self._best is None or loss < self._best
        self._best = loss if is_best else self._best
        self._publish(self._make_report("val_loss", window, iteration - 1))
        if is_best and self._config.save_best and self._group.leads:
            best = self._folder / BEST_FOLDER
            with self._replacing(BEST_FOLDER):
                config, base = self._config.to_dict(), self._origin.base
                save_adapters(best, self._adapters.weights(), config, base=base)
            self._progress.saved(iteration - 1, best)

    def save(self, numbered: bool = False) -> None:
        """Save the run as it was after the last complete step.

        Args:
            numbered: also save the adapter under its step's number, as mlx-lm does.
        """
        if self._group.leads:
            with self._replacing(BEST_FOLDER, FOLDER, NUMBERED_FILES):
                self._save(numbered)
        self._saved = self._iteration
        self._progress.saved(self._iteration, self._folder)

    def _save(self, numbered: bool) -> None:
        iteration, config = self._iteration, self._config.to_dict()
        if self._config.keep_checkpoints and self._is_whole():
            save_checkpoint(
                self._folder,
                self._adapters,
                self._optimizer,
                self._state(),
                config,
                self._origin.plan(),
                self._origin.base,
            )
            remove_old(self._folder, self._config.keep_checkpoints)
        step = iteration if numbered else None
        save_adapters(self._folder, self._adapters.weights(), config, step, self._origin.base)

    @contextlib.contextmanager
    def _replacing(self, *patterns: str) -> Iterator[None]:
        """Context of a save: the first save of each pattern replaces files of another run."""
        others = [pattern for pattern in patterns if pattern not in self._replaced]
        with self._origin.replacing(self._folder, others):
            yield
        self._replaced.update(others)

    def _is_whole(self) -> bool:
        """Whether the state in memory is that of a complete step.

        It is not if a failed step has added gradients to those accumulated before.
        """
        return self._between or not self._weights

    def _state(self) -> RunState:
        high, low = self._key.tolist()
        return RunState(
            step=self._iteration,
            accumulated=self._weights,
            first_tokens=self._first_terms,
            trained_tokens=self._trained_tokens,
            random_key=(high, low),
            train_loss=self._last.get("train_loss"),
            val_loss=self._last.get("val_loss"),
            best_val_loss=self._best,
            fingerprints=self._origin.fingerprints,
            working_folder=self._working_folder,
        )

    def end_early(self, requests: StopRequests) -> None:
        """Save the run, and report why it ends early.

        Raises:
            Stopped: a signal ended the run.
        """
        if not self.is_due(self._config.steps_per_report, self._iteration):
            self.report(self._iteration)
        if self._saved < self._iteration:
            self.save()
        why = "max_time is over" if requests.time_is_over else "another process was asked to stop"
        if requests.signal is not None:
            why = signal.Signals(requests.signal).name
        more = ""
        if self._config.keep_checkpoints and self._iteration < self._config.iters:
            more = "; the same command with --resume goes on"
        self._progress.note(
            f"{why}: ended after step {self._iteration} of {self._config.iters}{more}"
        )
        if requests.signal is not None:
            raise Stopped(requests.signal)

    def save_unsaved(self) -> str:
        """Try to save the steps since the last save; returns `last_saved_message`."""
        failures = EdgeLoraError, RuntimeError, MemoryError, OSError
        if self._updated > self._saved:
            with contextlib.suppress(*failures):
                mx.synchronize()  # raises pending errors of the failed step here, before the save
            with contextlib.suppress(*failures):
                self.save()
        return self.last_saved_message()

    def last_saved_message(self) -> str:
        """Description of the adapter on disk, for messages."""
        file = self._folder / WEIGHTS_FILE
        if self._saved:
            return f"the last good adapter, of step {self._saved}, is in {file}"
        if file.exists():
            return f"no adapter was saved yet in this run, {file} is as it was before"
        return "no adapter was saved yet in this run"

    def result(self) -> TrainResult:
        """Results of the run."""
        return TrainResult(
            iterations=self._iteration,
            train_loss=self._last["train_loss"],
            val_loss=self._last.get("val_loss"),
            trained_tokens=self._trained_tokens,
            peak_memory_bytes=peak_memory(),
            adapter_path=self._folder,
        )

    def _make_report(self, kind: str, window: Window, iteration: int) -> LossReport:
        rate = self._optimizer.learning_rate.item()
        norm = self._grad_norm if kind == "train_loss" else None
        return window.report(kind, iteration, rate, self._trained_tokens, norm)

    def _publish(self, report: LossReport) -> None:
        self._last[report.kind] = report.loss
        with self._saved_on_failure():
            self._progress.report(report)
            if self._log is not None:
                self._log.write(report.record() | {"recent_peak_bytes": recent_peak()})
            for callback in self._callbacks:
                if report.kind == "val_loss":
                    callback.on_val_loss_report(report.callback_info())
                else:
                    callback.on_train_loss_report(report.callback_info())

    @contextlib.contextmanager
    def _saved_on_failure(self) -> Iterator[None]:
        """Context that saves the steps since the last save before it lets an exception pass."""
        finished = False
        try:
            yield
            finished = True
        finally:
            if not finished and self._updated > self._saved:
                with contextlib.suppress(OSError):  # standard output may be closed
                    self.save()

    def _check_finite(
        self, iteration: int, batch: Batch | None, loss: float, magnitudes: Magnitudes
    ) -> None:
        what, bad = None, magnitudes.first_bad()
        if not math.isfinite(loss):
            what = f"loss is {loss}"
        elif bad is not None:
            what = f"the gradient of {bad} holds NaN or infinity"
        if what is not None:
            indices = () if batch is None else batch.indices
            rows = abbreviate([self._row_name(index) for index in indices]) or "the rows"
            raise EdgeLoraError(
                f"step {iteration}: {what}, expected finite numbers; lower the learning rate or "
                f"check {rows}; {self.last_saved_message()}"
            )

    def _row_name(self, index: int) -> str:
        known = isinstance(self._train_set, Dataset)
        return self._train_set.place(index) if known else f"row {index}"
