"""Compile the CUDA kernels that nvrtc_cache.c wrote down, several at once, the slowest first.

    python compile_kernels.py SOURCES CACHE [--nvrtc FILE] [--include FOLDER ...]

Needs NVRTC (the pip package nvidia-cuda-nvrtc of the driver's version or older) and no GPU. With
--include these folders stand for those of the machine on which the sources were written down:
CUDA's headers (nvidia-cuda-runtime, nvidia-cuda-crt), and mlx/include and mlx/include/cccl of
MLX's CUDA build.
"""

import argparse
import ctypes
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path


def strings(texts: list[bytes]) -> ctypes.Array:
    """An array of C strings."""
    return (ctypes.c_char_p * len(texts))(*texts)


def read(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    """What NVRTC gives by a size and a buffer."""
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def compile_one(args: argparse.Namespace, until: float, key: str) -> tuple[str, float, str]:
    """Compile one program into the cache; gives its seconds, and what went wrong."""
    if time.monotonic() > until:
        return key, 0.0, "late"
    start, library = time.monotonic(), ctypes.CDLL(args.nvrtc)
    headers = sorted((args.sources / "headers").iterdir())
    names = [name.encode() for name in (args.sources / f"{key}.names").read_text().splitlines()]
    options = (args.sources / "options").read_text().splitlines()
    if args.include:
        options = [option for option in options if not option.startswith("--include-path")]
        options += [f"--include-path={folder}" for folder in args.include]
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(
        ctypes.byref(program),
        (args.sources / f"{key}.cu").read_bytes(),
        b"kernel.cu",
        len(headers),
        strings([header.read_bytes() for header in headers]),
        strings([header.name.replace("@", "/").encode() for header in headers]),
    )
    for name in names:
        library.nvrtcAddNameExpression(program, name)
    if library.nvrtcCompileProgram(program, len(options), strings([o.encode() for o in options])):
        return key, time.monotonic() - start, read(library, "ProgramLog", program).decode()[:1000]
    lowered, given = b"", ctypes.c_char_p()
    for name in names:
        library.nvrtcGetLoweredName(program, name, ctypes.byref(given))
        lowered += given.value + b"\n"
    # The second one makes it whole.
    for suffix, content in (("txt", lowered), ("cubin", read(library, "CUBIN", program))):
        temporary = args.cache / f"{key}.{suffix}.{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(args.cache / f"{key}.{suffix}")
    return key, time.monotonic() - start, ""


def slowness(source: Path) -> tuple[int, int]:
    """Products with packed matrices take minutes, others seconds."""
    names = source.with_suffix(".names").read_text()
    return ("qmm" in names) + ("qmm_sm" in names), source.stat().st_size


def main() -> None:
    """Compile what is not in the cache yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=1e9, help="none is begun after these")
    parser.add_argument("--nvrtc", default="libnvrtc.so.13")
    parser.add_argument("--include", nargs="*", default=[])
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    every = sorted(args.sources.glob("*.cu"), key=slowness, reverse=True)
    keys = [file.stem for file in every if not (args.cache / f"{file.stem}.cubin").exists()]
    print(f"{len(keys)} of {len(every)} programs to compile", flush=True)
    start, spent, late = time.monotonic(), 0.0, 0
    work = partial(compile_one, args, start + args.seconds)
    with ProcessPoolExecutor(args.processes) as pool:
        for key, seconds, problem in pool.map(work, keys):
            spent += seconds
            late += problem == "late"
            if problem not in ("", "late"):
                print(f"{key}: {problem}", flush=True)
    print(f"{time.monotonic() - start:.0f} s, {spent:.0f} s of one core, {late} not begun")


if __name__ == "__main__":
    main()
