"""The `local` engine: our own batched decoder, on a Hugging Face folder, the Hub, or a run.

All requests of a call are one batch. Each row draws by its own seed; nothing else of the batch decides what it says, as
far as rounding allows: logits in bf16 or fp32 move a little with the batch's shape, which now and then turns a draw.
So the same requests in the same batch give the same answers on the same card and build, and nothing is promised across.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoints
from checkpoints import CheckpointError, checkpoint, huggingface
from distill.teachers import Answer, Request, TeacherError
from models.inference.sampling import Sampling
from storage import folder
from tokenizer import Tokenizer, TokenizerError
from tokenizer.conversations import ChatFormat, TemplateRefusal, begun

if TYPE_CHECKING:
    import torch

HUB = "hub:"
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}  # as torch calls them


class Local:
    """A model on this process's own device; its weights are loaded when it is first asked, or asked for `versions`.

    Args:
        model: hub:OWNER/NAME, a Hugging Face folder, a run or one of its checkpoints.
        dtype: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32 or fp64.
        context: positions that memory is reserved for in each row; None: the model's own.
        device: auto, cpu, cuda or mps; auto: each process on a node the GPU of its LOCAL_RANK, else the CPU.

    Raises:
        TeacherError: there is no such model, or its tokenizer writes no conversations.
    """

    def __init__(self, model: str, *, dtype: str = "auto", context: int | None = None, device: str = "auto"):
        self._name, self._dtype, self._context, self._asked = model, dtype, context, device
        try:
            self._path = checkpoints.locate(model)
            self._tokenizer = Tokenizer.load(checkpoints.tokenizer_of(self._path))
            self._format = ChatFormat(self._tokenizer)
            self._start = list(checkpoints.text_start(self._path, self._tokenizer))
            self._stops = sorted({*self._format.stop_ids, *checkpoints.stop_ids(self._path, self._tokenizer)})
            self._never = checkpoints.never_drawn(self._path, self._tokenizer)
        except (CheckpointError, TokenizerError) as error:
            raise TeacherError(f"teacher.model: {model}: {error}") from error
        self._model: torch.nn.Module | None = None

    def about(self) -> dict[str, Any]:
        """Model and revision, or digest; tokenizer, template; and what was asked of its arithmetic."""
        return {"engine": "local", **identity(self._name, self._path), "tokenizer": self._tokenizer.fingerprint,
                "template": self._format.fingerprint, "dtype": self._dtype, "context": self._context}  # fmt: skip

    def versions(self) -> dict[str, Any]:
        """Engine, torch's version, device and dtype."""
        import torch

        weight = next(self._loaded().parameters())
        is_gpu = weight.device.type == "cuda"
        device = torch.cuda.get_device_name(weight.device) if is_gpu else weight.device.type
        return {"engine": "local", "version": torch.__version__, "device": device,
                "dtype": str(weight.dtype).removeprefix("torch.")}  # fmt: skip

    def answer(self, requests: Sequence[Request], sampling: Sampling, max_new_tokens: int) -> list[Answer]:
        """One answer a request, all in one batch. A request that does not fit the context, or whose roles the template
        has no form for, is refused. Special tokens that the model wrote into its answer are in its text by their names;
        those that it has never seen it does not write.

        Raises:
            TeacherError: the model cannot be loaded, or the device has too little memory.
        """
        from models.inference.decoding import generate

        model = self._loaded()
        prompts = [self._prompt(request) for request in requests]
        room = [model.config.context - len(prompt) if prompt else 0 for prompt in prompts]
        asked = [row for row in range(len(requests)) if room[row] > 0]
        try:
            outputs = generate(
                model, [prompts[row] for row in asked], max_new_tokens, self._stops, sampling,
                entries=self._tokenizer.vocab_size, seeds=[requests[row].seed for row in asked], never=self._never,
            )  # fmt: skip
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            raise TeacherError(f"{len(asked)} requests at once need more memory than the device has: lower "
                               "teacher.context, or job.chunk, which begins another job") from error  # fmt: skip
        answers = [Answer("", "refused", len(prompt), 0) for prompt in prompts]
        for row, ids in zip(asked, outputs, strict=True):
            is_cut = len(ids) == min(max_new_tokens, room[row])
            text = self._tokenizer.decode(ids)
            answers[row] = Answer(text, "length" if is_cut else "stop", len(prompts[row]), len(ids) + (not is_cut))
        return answers

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _prompt(self, request: Request) -> list[int]:
        """Ids of a request; none where the template has no form for it."""
        try:
            return begun(self._start, self._format.prompt(request.messages))
        except TemplateRefusal:
            return []

    def _loaded(self) -> "torch.nn.Module":
        if self._model is None:
            from machine import process

            process.prepare()
            import torch

            from models.inference.ready import for_decoding

            device = device_of(self._asked)
            dtype = getattr(torch, DTYPES[resolved(self._dtype, device)])
            try:
                self._model = checkpoints.load_model(self._path, device, context=self._context, dtype=dtype,
                                                     located=True)[0]  # fmt: skip
            except CheckpointError as error:
                raise TeacherError(f"teacher.model: {error}") from error
            if dtype == torch.float64:
                self._model.double()  # the norms too, which are loaded in fp32
            if device == "cpu":
                # A sum is another one on more threads, and so would the text be with another number of processes. For
                # the same reason it is not made `for_decoding`, which takes the products that are fastest at the time.
                torch.set_num_threads(1)
            else:
                self._model = for_decoding(self._model, "bf16" if dtype == torch.bfloat16 else "fp32")
        return self._model


def identity(name: str, path: Path) -> dict[str, str]:
    """What tells a model from any other: of the Hub, its name and revision, else the digest of its weights.

    Args:
        name: how it was asked for; path: where `checkpoints.locate` found it.

    Raises:
        TeacherError: a Hugging Face folder without safetensors.
    """
    if name.startswith(HUB):  # the Hub's cache keeps a revision's files in a folder of its name
        return {"model": name.removeprefix(HUB), "revision": path.name}
    if not huggingface.is_folder(path):
        sums = folder.sums(path)
        return {"digest": _digest([sums[checkpoint.MODEL_CONFIG], sums[checkpoint.MODEL]])}
    try:
        files = huggingface.weight_files(path)
    except CheckpointError as error:
        raise TeacherError(f"teacher.model: {error}") from error
    return {"digest": _digest([folder.sha256(file) for file in (path / huggingface.CONFIG, *files)])}


def resolved(dtype: str, device: str) -> str:
    """A key of DTYPES; auto is bf16 on a GPU, fp32 elsewhere."""
    return dtype if dtype != "auto" else "bf16" if device.startswith("cuda") else "fp32"


def _digest(sums: list[str]) -> str:
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def device_of(asked: str) -> str:
    """The device of this process, among those of its node."""
    import torch

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    wants_cpu = asked == "cpu" or (asked == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
    if asked == "mps" or wants_cpu or (asked == "auto" and not torch.cuda.is_available()):
        if asked == "mps" and not torch.backends.mps.is_available():
            raise TeacherError("teacher.device: mps is not there: use auto")
        return "mps" if asked == "mps" else "cpu"
    if not torch.cuda.is_available():
        raise TeacherError("teacher.device: cuda is not there: use auto or cpu")
    if rank >= torch.cuda.device_count():
        raise TeacherError(f"{torch.cuda.device_count()} GPUs are here and process {rank + 1} has none: start fewer "
                           "processes (accelerate launch --num_processes)")  # fmt: skip
    return f"cuda:{rank}"
