"""Causal language models from folders, GGUF files, the hub, adapters, or memory."""

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastmem.base.arguments import checked_device, user_path
from fastmem.base.ranks import active
from fastmem.models.causal.anatomy import check_kind
from fastmem.models.causal.lm import CausalLM
from fastmem.models.causal.sharded import ADAPTER, check_shardable, sharding_arguments
from fastmem.models.gpt import GPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUN = "run.json"
"""The file that `fastmem train` writes beside a model."""
_TOKENIZERS = ("tokenizer*", "vocab*", "*.tiktoken", "spiece.model", "sentencepiece*", "merges.txt")
_BITSANDBYTES = {"8bit": "load_in_8bit", "4bit": "load_in_4bit"}


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to score."""

    lm: CausalLM
    tokenizer: "PreTrainedTokenizerBase | None"
    """None if the model has none, such as a model of tokens without text."""
    name: str
    """The path or the name that was asked for; the class of a live model."""
    folder_of_fastmem: bool
    """True if `fastmem train` wrote the folder."""


def load_model(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    quantization: Any = None,
    trust_remote_code: bool = False,
    shard: bool = False,
) -> Loaded:
    """A causal language model and its tokenizer.

    Args:
        model: a folder of fastmem; a folder or a hub name that AutoModelForCausalLM loads; a GGUF
            file, or a folder with a single one; a folder of a PEFT adapter, whose base is loaded
            too; or an nn.Module in memory.
        tokenizer: the tokenizer, or its folder or hub name; None: the tokenizer of the model, if it
            has one.
        dtype: of the weights, "float32", "bfloat16" or "float16"; "auto": as they are stored.
        device: "auto": a GPU where there is one, inside `fastmem.joined` that of this rank. For a
            live model: where it is.
        device_map: spreads the model as accelerate does, such as "auto"; then device is "auto".
        quantization: "8bit" or "4bit" of bitsandbytes, or a configuration of transformers, such as
            TorchAoConfig.
        trust_remote_code: True runs code that the model's folder brings.
        shard: True spreads the layers over the ranks of `fastmem.joined`, for a model that is
            larger than a GPU. Then all ranks must run the same number of forward passes, by
            `CausalLM.wait`.

    Raises:
        ValueError: the model cannot be loaded, its files lack weights, it is not a causal language
            model, an option does not fit it, or a package is missing; one line with the fix.

    Example:
        >>> loaded = load_model(GPT(fastmem.GPTConfig(1, 8, 2, vocab=16, length=4)))
        >>> loaded.name, loaded.lm.vocab, loaded.tokenizer
        ('GPT', 16, None)
    """
    options = {"dtype": dtype, "device": device}
    options |= {"device_map": device_map, "quantization": quantization}
    if shard:
        check_shardable(model, device_map=device_map, quantization=quantization)
    if isinstance(model, nn.Module):
        for name, value in options.items():
            if value not in (None, "auto"):
                raise ValueError(
                    f"{name} is {value!r} for a model in memory: change the model itself, for "
                    "example by model.to(...), and leave the option out"
                )
        tokenizer = _tokenizer(tokenizer, trust_remote_code)
        return Loaded(CausalLM(model), tokenizer, type(model).__name__, False)
    name = str(user_path(model))
    if device_map is not None and device != "auto":
        raise ValueError(f"device {device} and device_map {device_map!r}: give one of the two")
    path = Path(name)
    if (path / RUN).exists() and not shard:
        tokenizer = _tokenizer(tokenizer, trust_remote_code)
        return Loaded(CausalLM(_of_fastmem(path, options)), tokenizer, name, True)
    if _is_missing(str(model)):
        raise ValueError(f"{name} does not exist: give a folder, a GGUF file or a name on the hub")
    _require("transformers")
    arguments = _arguments(options, trust_remote_code) | ({"shard": True} if shard else {})
    if (path / ADAPTER).exists():
        found, base = _with_adapter(path, arguments)
    else:
        found, base = _of_transformers(name, arguments), name
    if device_map is None and quantization is None and not shard:
        found = found.to(_chosen(device))
    try:
        lm = CausalLM(found)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if tokenizer is None:
        tokenizer = name if _has_tokenizer(name) else base if _has_tokenizer(base) else None
    return Loaded(lm, _tokenizer(tokenizer, trust_remote_code), name, False)


def tokenizer_of(
    model: str | Path, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase | None":
    """The tokenizer that `load_model` finds beside a model; None without one, for an adapter that
    leaves it to its base, and for a path that does not exist."""
    path = user_path(model)
    if _is_missing(str(model)) or (path / RUN).exists() or not _has_tokenizer(str(path)):
        return None
    return _tokenizer(str(path), trust_remote_code)


def _is_missing(model: str) -> bool:
    """True for a path that does not exist, which cannot be a name on the hub."""
    path = user_path(model)  # which removes a leading ./
    looks_like_a_path = path.is_absolute() or model[:1] == "." or model.count("/") > 1
    looks_like_a_path |= path.suffix.lower() == ".gguf" and "/" not in model
    return not path.exists() and looks_like_a_path


def _of_fastmem(path: Path, options: dict[str, Any]) -> GPT:
    for name in ("device_map", "quantization"):
        if options[name] is not None:
            raise ValueError(
                f"{name} is {options[name]!r} for {path}, a model of fastmem: leave it out"
            )
    model = GPT.from_hf(path, _chosen(options["device"]))
    return model if options["dtype"] == "auto" else model.to(_dtype(options["dtype"]))


def _chosen(device: str | torch.device) -> torch.device:
    if device == "auto" and (job := active()):
        return job.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return checked_device(device)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not one of auto, float32, bfloat16 and float16")
    return found


def _arguments(options: dict[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    """The arguments of from_pretrained."""
    dtype = options["dtype"]
    arguments: dict[str, Any] = {"trust_remote_code": bool(trust_remote_code)}
    arguments["dtype"] = dtype if dtype == "auto" else _dtype(dtype)
    if options["device_map"] is not None:
        _require("accelerate")
        arguments["device_map"] = options["device_map"]
    quantization = options["quantization"]
    if isinstance(quantization, str):
        from transformers import BitsAndBytesConfig

        if quantization not in _BITSANDBYTES:
            raise ValueError(
                f"quantization {quantization!r} is not one of {', '.join(_BITSANDBYTES)}: give "
                "one of these, or a configuration of transformers"
            )
        _require("bitsandbytes")
        quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            **{_BITSANDBYTES[quantization]: True}
        )
    if quantization is not None:
        arguments["quantization_config"] = quantization
        arguments.setdefault("device_map", "auto" if options["device"] == "auto" else None)
        if arguments["device_map"] is None:
            arguments["device_map"] = {"": str(_chosen(options["device"]))}
    return arguments


def _of_transformers(name: str, arguments: dict[str, Any]) -> nn.Module:
    """What AutoModelForCausalLM loads; ValueError if it is half a model or another kind."""
    from transformers import AutoConfig, AutoModelForCausalLM

    place, gguf = _gguf(name)
    file: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    shown = name if Path(name).exists() else f"{name}, which is not a folder here,"
    if gguf is None:  # its configuration takes seconds to read, and is read again below
        with _one_line(shown):
            trust = arguments["trust_remote_code"]
            config = AutoConfig.from_pretrained(place, trust_remote_code=trust)
        kinds = getattr(config, "architectures", None) or [f"a model of type {config.model_type}"]
        kind = "" if getattr(config, "is_decoder", False) else kinds[0]  # a BERT that is causal
        check_kind(f"{name} ({kinds[0]})", kind, config)  # before the weights are read
        if arguments.pop("shard", False):
            arguments |= sharding_arguments(name, config, trust)
    with _one_line(shown):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, output_loading_info=True, **arguments, **file
        )
    model, info = loaded
    lacks = sorted({*info["missing_keys"], *(each[0] for each in info["mismatched_keys"])})
    if lacks or info["error_msgs"]:
        what = f"such as {lacks[0]}" if lacks else str(info["error_msgs"][0]).splitlines()[0]
        raise ValueError(
            f"{name} lacks {len(lacks)} weights of {type(model).__name__}, {what}, which would be "
            "random numbers: download or save the whole model again"
        )
    assert isinstance(model, nn.Module)
    return model


def _gguf(name: str) -> tuple[str, str | None]:
    """The folder and the name of a GGUF file; None for other models."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise ValueError(f"{name} holds {len(files)} GGUF files: give one, such as {files[0]}")
        if not files:
            raise ValueError(
                f"{name} holds neither config.json nor a GGUF file: give the folder of a model"
            )
        path = files[0]
    elif not path.is_file():
        return name, None
    if path.suffix != ".gguf":
        raise ValueError(f"{name} is not a .gguf file: give the folder of the model")
    _require("gguf")
    _require("accelerate")
    return str(path.parent), path.name


def _with_adapter(path: Path, arguments: dict[str, Any]) -> tuple[nn.Module, str]:
    """The model of a PEFT adapter around its base, and the name of the base."""
    _require("peft")
    from peft import PeftModel

    try:
        base = json.loads((path / ADAPTER).read_bytes())["base_model_name_or_path"]
        if not isinstance(base, str) or not base:
            raise ValueError(f"base_model_name_or_path is {base!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path / ADAPTER} does not name a base model ({error!r}): add base_model_name_or_path"
        ) from None
    try:
        model = _of_transformers(base, arguments)
    except ValueError as error:
        raise ValueError(f"{path} is an adapter of {base}: {error}") from None
    with warnings.catch_warnings(), _one_line(str(path)):
        warnings.filterwarnings("error", "Found missing adapter keys")
        adapted: nn.Module = PeftModel.from_pretrained(model, str(path))
    return adapted, base


def _has_tokenizer(name: str) -> bool:
    """True if the files of the model have a tokenizer, or are not on this machine."""
    path = Path(name)
    if path.is_dir():
        return any(any(path.glob(pattern)) for pattern in (*_TOKENIZERS, "*.gguf"))
    return True


def _tokenizer(given: Any, trust_remote_code: bool) -> "PreTrainedTokenizerBase | None":
    if not isinstance(given, (str, Path)):
        return given  # type: ignore[no-any-return]
    _require("transformers")
    from transformers import AutoTokenizer

    name = str(user_path(given))
    place, gguf = (name, None)
    if Path(name).is_file() or not (Path(name) / "tokenizer_config.json").exists():
        place, gguf = _gguf(name) if name.endswith(".gguf") or _only_gguf(name) else (name, None)
    file = {} if gguf is None else {"gguf_file": gguf}
    with _one_line(f"the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(
            place, trust_remote_code=bool(trust_remote_code), **file
        )


def _only_gguf(name: str) -> bool:
    path = Path(name)
    return path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf"))


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Errors of transformers, of files and of the network as ValueErrors of one line."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in text:
            text = "it brings code of its own, which is not run unless trust_remote_code is True"
        raise ValueError(f"{name} cannot be loaded: {text:.400}") from error


def _require(package: str) -> None:
    """ValueError with the pip line if an optional package is missing."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ValueError:  # the package is blocked in sys.modules
        found = False
    if not found:
        extra = "fastmem-lm[hf]" if package != "bitsandbytes" else package
        raise ValueError(f"{package} is not installed: pip install '{extra}'")
