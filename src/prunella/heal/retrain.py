"""Retraining: the language-model loss on the whole model, by transformers' Trainer."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..compat import has_bfloat16_products, quiet_transformers, use_one_gpu
from ..errors import InputError, NumericalError
from ..model.network import Model
from ..progress import Track, Watcher, no_track
from ..stream import through
from .loss import next_token_loss
from .parts import Chosen, trained
from .processes import gather, is_sharded, scatter, shard, share_optimizer, told, world

WEIGHTS = "model.safetensors"
_RECOMPUTE = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"  # newer, older name


@dataclass(frozen=True)
class Plan:
    """How to retrain; the fields are those of the recipe's `heal` section."""

    steps: int
    batch: int
    micro: int
    warmup: float
    clip: float
    betas: tuple[float, float]
    share: float
    temperature: float
    evaluations: int
    patience: int
    checkpointing: bool
    seed: int


class Teacher(Protocol):
    """The dense model's logits for some of the training windows."""

    def __call__(self, index_B: Tensor, ids_BL: Tensor) -> Tensor: ...


@contextlib.contextmanager
def teacher_in_memory(model: Model, sharded: bool = False) -> Iterator[Teacher]:
    """The whole dense model stays in memory, or each process's share of it, and runs beside the one that is trained."""
    with contextlib.ExitStack() as stack:
        if sharded:
            shard(model)
        else:
            stack.enter_context(model.whole())

        def logits(index_B: Tensor, ids_BL: Tensor) -> Tensor:
            with torch.no_grad():
                out: Tensor = model.network(input_ids=ids_BL, use_cache=False).logits
            return out

        yield logits


@contextlib.contextmanager
def teacher_streamed(model: Model, windows_NL: Tensor, track: Track = no_track) -> Iterator[Teacher]:
    """The dense model is streamed once, block by block, over all windows; what stays is its last hidden states (in
    memory, or on disk where they do not fit) and its head."""
    stream = through(model, windows_NL, track=track, what="teacher")
    with model.outside():

        def logits(index_B: Tensor, ids_BL: Tensor) -> Tensor:
            rows = [stream.window(n) for n in index_B.tolist()]
            return stream.calls.logits(ids_BL, torch.cat(rows, stream.calls.interface.batch))

        yield logits


@dataclass(frozen=True)
class Outcome:
    """What a retraining did: the loss of every step, and of the held-out windows {step: loss}. The best step is 0 where
    no step was better than what was there before."""

    losses: tuple[float, ...]
    held_out: dict[int, float]
    best_step: int
    steps: int


def retrain(
    model: Model,
    chosen: Sequence[Chosen],
    windows_NL: Tensor,
    held_out_NL: Tensor | None,
    plan: Plan,
    folder: Path,
    *,
    teacher: Teacher | None = None,
    resume: bool = False,
    watch: Watcher | None = None,
) -> Outcome:
    """Train the attached changes of a model whose weights are loaded, or sharded.

    What a sharded one makes in forward is made again, block by block, in backward, whatever `plan.checkpointing` says:
    else each process would hold whole weights of all layers.

    Args:
        windows_NL: what to train on, in this order; taken again from the start where more is asked for.
        held_out_NL: what to find the best checkpoint on.
        folder: for checkpoints.
        resume: continue from the last of them, if there is one.
    Raises:
        NumericalError: the loss is not finite; the checkpoints stay.
    """
    network = model.network
    bf16 = model.dtype == torch.float32 and _fast_bfloat16(model.device)
    processes = world(model.device).num_processes
    checkpointing = plan.checkpointing or is_sharded(network)
    micro = min(plan.micro, -(-plan.batch // processes))
    if plan.batch % (micro * processes):
        raise InputError(
            f"a step of {plan.batch} windows cannot be shared by {processes} processes, {micro} windows at a time each:"
            " choose a multiple (--set heal.batch=…, --set heal.micro=…)."
        )
    every = max(1, math.ceil(plan.steps / plan.evaluations)) if held_out_NL is not None else max(1, plan.steps // 4)
    checkpoint = _last_checkpoint(folder) if resume else None
    with told(model.device):
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=plan.micro,
            gradient_accumulation_steps=plan.batch // (micro * processes),
            max_steps=plan.steps,
            learning_rate=max(item.group.rate for item in chosen),
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(plan.warmup * plan.steps),
            weight_decay=0.0,
            max_grad_norm=plan.clip,
            bf16=bf16,
            **({f"{_RECOMPUTE}_checkpointing": True} if checkpointing else {}),
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="no" if held_out_NL is None else "steps",
            eval_on_start=held_out_NL is not None and checkpoint is None,
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,
            load_best_model_at_end=held_out_NL is not None,
            metric_for_best_model="eval_loss" if held_out_NL is not None else None,
            greater_is_better=False,
            prediction_loss_only=True,
            remove_unused_columns=False,
            label_names=["labels"],
            train_sampling_strategy="sequential",
            report_to="none",
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            seed=plan.seed,
            dataloader_pin_memory=model.device.type == "cuda",
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,  # the masks are the same everywhere
            restore_callback_states_from_checkpoint=True,
            log_level="error",
        )
    if arguments.n_gpu > 1:
        use_one_gpu(arguments)  # DataParallel is what a Change does not survive
    if model.device.index not in (None, arguments.device.index):  # `cuda` without a number is any of them
        raise InputError(
            f"retraining runs on {arguments.device} here, not on {model.device}: choose with CUDA_VISIBLE_DEVICES."
        )
    callbacks: list[TrainerCallback] = [_Watch(watch)]
    if held_out_NL is not None:
        callbacks.append(EarlyStoppingCallback(plan.patience))
    changes = list(dict.fromkeys(item.change for item in chosen))
    for change in changes:
        change.keep = not checkpointing
    cache = network.config.use_cache
    with quiet_transformers(), no_dropout(network), own_forward(network), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)  # the Trainer sets it
        trainer = _Healer(chosen, plan, teacher, network, arguments, windows_NL, held_out_NL, callbacks)
        try:
            path, state = checkpoint or (None, None)
            if state is not None and _stopped(state, plan.patience):
                trainer.state = state
                trainer._load_best_model()
            else:
                trainer.train(resume_from_checkpoint=path)
        finally:
            network.config.use_cache = cache
            network.eval()
            if checkpointing:
                getattr(network, f"{_RECOMPUTE}_checkpointing_disable")()
            for change in changes:
                change.keep = False
                change.forget()
    history = trainer.state.log_history
    held_out = {int(row["step"]): float(row["eval_loss"]) for row in history if "eval_loss" in row}
    losses = tuple(float(row["loss"]) for row in history if "loss" in row)
    steps = trainer.state.global_step
    best = trainer.state.best_global_step or steps
    if held_out.get(0, math.inf) <= held_out.get(best, -math.inf):
        best = 0
    return Outcome(losses, held_out, best, steps)


@contextlib.contextmanager
def own_forward(network: nn.Module) -> Iterator[None]:
    """What the Trainer puts around the forward pass, such as autocast, goes with it: what is measured afterwards is the
    network and nothing else."""
    keys = ("forward", "_original_forward")  # accelerate's names
    before = {key: vars(network)[key] for key in keys if key in vars(network)}
    try:
        yield
    finally:
        for key in keys:
            vars(network).pop(key, None)
        vars(network).update(before)


@contextlib.contextmanager
def no_dropout(network: nn.Module) -> Iterator[None]:
    """Nothing is dropped while it trains: the first step starts from the pruned model, and what was pruned has little
    to spare. Dropout is a module here and a number of an attention module there."""
    before = [
        (module, key, value)
        for module in network.modules()
        for key, value in vars(module).items()
        if isinstance(value, float) and (key == "p" if isinstance(module, nn.Dropout) else "drop" in key)
    ]
    try:
        for module, key, _ in before:
            setattr(module, key, 0.0)
        yield
    finally:
        for module, key, value in before:
            setattr(module, key, value)


def _last_checkpoint(folder: Path) -> tuple[str, TrainerState] | None:
    """The newest whole checkpoint, with the Trainer's state, which is its last file."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    for _, path in sorted(found.items(), reverse=True):
        with contextlib.suppress(OSError, ValueError, TypeError):
            return str(path), TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
    return None


def _stopped(state: TrainerState, patience: int) -> bool:
    """Had the run stopped early when it saved this state?"""
    saved = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, {})
    waited: int = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return waited >= patience


class _Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """`count` windows, from the start again where there are fewer."""

    def __init__(self, windows_NL: Tensor, count: int):
        self.windows_NL, self.count = windows_NL, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        n %= len(self.windows_NL)
        ids_L = self.windows_NL[n]
        return {"input_ids": ids_L, "labels": ids_L, "index": torch.tensor(n)}


class _Healer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints hold what trains and nothing else."""

    optimizer: Any

    def __init__(
        self,
        chosen: Sequence[Chosen],
        plan: Plan,
        teacher: Teacher | None,
        network: nn.Module,
        arguments: TrainingArguments,
        windows_NL: Tensor,
        held_out_NL: Tensor | None,
        callbacks: list[TrainerCallback],
    ):
        self.chosen, self.plan, self.teacher = chosen, plan, teacher
        super().__init__(
            model=network,
            args=arguments,
            train_dataset=_Windows(windows_NL, plan.steps * plan.batch),
            eval_dataset=None if held_out_NL is None else _Windows(held_out_NL, len(held_out_NL)),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        if is_sharded(network):  # said before, the Trainer would refuse to save what resuming needs
            self.is_distributed_loading_by_transformers = True
        self.model_accepts_loss_kwargs = False  # our loss is a mean over a micro-batch; all are of one size

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # deferred, every process would hold whole gradients meanwhile

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named: dict[str, dict[str, Any]] = {}
            for item in self.chosen:
                group = named.setdefault(item.group.name, {"params": [], "lr": item.group.rate})
                group["params"] += list(item.change.parameters())
            optimizer = torch.optim.AdamW(list(named.values()), betas=self.plan.betas, weight_decay=0.0, fused=True)
            optimizer.register_step_post_hook(lambda *_: self._forget())
            if is_sharded(self.model):
                share_optimizer(optimizer)
            self.optimizer = optimizer
        return self.optimizer  # type: ignore[no-any-return]

    def _forget(self) -> None:
        """What trains has changed."""
        for item in self.chosen:
            item.change.forget()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        ids_BL = inputs["input_ids"]
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
        teacher_BLV = None
        if self.teacher is not None and not return_outputs:  # held-out text is scored as text
            teacher_BLV = self.teacher(inputs["index"], ids_BL)
        loss = next_token_loss(
            logits_BLV, ids_BL, teacher_BLV, share=self.plan.share, temperature=self.plan.temperature
        )
        if not return_outputs and not torch.isfinite(loss):
            best = self.state.best_model_checkpoint
            kept = f" The best checkpoint is kept in '{best}'." if best else ""
            raise NumericalError(
                f"healing diverged: the loss of step {self.state.global_step + 1} is {loss.item()}. Use a lower"
                f" learning rate (--set heal.rate=…), and delete '{Path(self.args.output_dir).parent}' before.{kept}"
            )
        return (loss, {}) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        tensors = gather(trained(self.chosen), keep=self.args.should_save)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if is_sharded(self.model) and not self.args.should_save:
            self.optimizer.state_dict()  # the process that saves waits for this one's share

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        scatter(load_file(Path(resume_from_checkpoint) / WEIGHTS), trained(self.chosen))
        self._forget()

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Watch(TrainerCallback):  # type: ignore[misc]
    def __init__(self, watch: Watcher | None):
        self.watch = watch

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.watch is not None and state.is_world_process_zero and logs and "loss" in logs:
            self.watch(state.global_step, state.max_steps, logs["loss"])


def _fast_bfloat16(device: torch.device) -> bool:
    """Does bfloat16 pay on this processor?"""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" and has_bfloat16_products()
