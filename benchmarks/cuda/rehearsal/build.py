"""Build the rehearsal's CUDA libraries for the onnxruntime-gpu of a Python.

    python -m benchmarks.cuda.rehearsal.build FOLDER [--python PYTHON]
    LD_LIBRARY_PATH=FOLDER PYTHON ...

With FOLDER in LD_LIBRARY_PATH, the CUDA provider of that onnxruntime-gpu starts on a machine without a GPU: it places
nodes, binds, captures and copies as on one, and computes nothing (cudart.c). onnxruntime-genai-cuda starts too. Needs
gcc, nm, readelf and CUDA's headers. FOLDER/tensorrt has what list_kernels needs besides; with it, a session on
TensorRT's provider ends the process.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
PROVIDERS = ("libonnxruntime_providers_cuda.so", "libonnxruntime_providers_tensorrt.so")

# The sources of a library, by the beginning of its name. Those of cuBLAS are generated.
SOURCES = {"libcudart": "cudart.c", "libcuda.": "driver.c"}
TENSORRT = ("libnvinfer", "libnvonnxparser", "libcudnn")
ONLY_LINKED = ("libcufft.so.12",)
"""What onnxruntime-genai is linked with, and does not call here."""
GENERATED = ("libcublas", "libcublasLt", "libcurand")

# Of the generated stubs, those that do more than to return 0, by a pattern of their names.
STUBS = {
    r"cublas\w*GetStatus\w+": 'const char *{name}(int status) {{ return "none"; }}',
    r"cublas\w*Create\w*": "int {name}(void **handle) {{ static long room[64]; *handle = room; return 0; }}",
    r"cublasGetMathMode": "int {name}(void *handle, int *mode) {{ *mode = 0; return 0; }}",
    r"cublasLtMatmulAlgoGetHeuristic": "int {name}(void *handle, void *product, void *a, void *b, void *c, void *d, "
    "void *preference, int wanted, void *results, int *found) {{ *found = 1; return 0; }}",
    r"cublas[SD]?(Gemm|gemm|geam)\w*|cublasLtMatmul": "void rehearsal_launch(void); "
    "int {name}(void) {{ rehearsal_launch(); return 0; }}",
    r"\w+": "int {name}(void) {{ return 0; }}",
}


def build(capi: Path, folder: Path) -> list[Path]:
    """Build every CUDA library that the providers in `capi` (onnxruntime's folder of that name) need into `folder`;
    returns them. Raises SystemExit with one line that says what is missing."""
    provider = capi / PROVIDERS[0]
    if not provider.is_file():
        raise SystemExit(f"no {provider.name} in {capi}: install onnxruntime-gpu in the Python that will use it")
    present = [capi / name for name in PROVIDERS if (capi / name).is_file()]
    needed = sorted({name for path in present for name in _needed(path)}, key=lambda name: "cudart" not in name)
    wanted = {name for path in present for name in _undefined(path)}
    apart = folder / "tensorrt"
    apart.mkdir(parents=True, exist_ok=True)
    built = [_library(name, apart if name.startswith(TENSORRT) else folder, wanted) for name in (*needed, *ONLY_LINKED)]
    missing = sorted({symbol for symbol, _ in wanted} - {symbol for path in built for symbol in _defined(path)})
    if missing:
        raise SystemExit(f"{provider} calls {', '.join(missing)}, which the sources in {HERE} do not have; add them")
    return built


def onnxruntime_folder(python: str) -> Path:
    """The folder `capi` of a Python's onnxruntime. Raises SystemExit where it has none."""
    code = "import importlib.util; print(*importlib.util.find_spec('onnxruntime').submodule_search_locations)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{python} has no onnxruntime: install onnxruntime-gpu in it")
    return Path(found.stdout.strip()) / "capi"


def cuda_headers() -> Path:
    """The folder with cuda_runtime_api.h. Raises SystemExit where there is none."""
    places = [Path("/usr/local/cuda/include"), *(Path(path) / "nvidia" / "cu13" / "include" for path in sys.path)]
    for place in places:
        if (place / "cuda_runtime_api.h").is_file():
            return place
    raise SystemExit(f"no cuda_runtime_api.h in {places[0]}: install CUDA, or nvidia-cuda-runtime in this Python")


def _needed(library: Path) -> list[str]:
    """CUDA's libraries among those that a library is linked with."""
    listed = _output("readelf", "--dynamic", str(library))
    return [name for name in re.findall(r"\(NEEDED\).*\[(lib\S+)\]", listed) if name.startswith(("libcu", "libnv"))]


def _undefined(library: Path) -> set[tuple[str, str]]:
    """(symbol, the library's name that its version has, or nothing) of what CUDA's libraries must define."""
    lines = re.findall(r"U (\S+?)(?:@(\S+))?$", _output("nm", "--dynamic", "--undefined-only", str(library)), re.M)
    ours = re.compile(r"(__)?cu[a-zA-Z]+|createInfer\w+|createNvOnnx\w+|getInferLibVersion|getPluginRegistry")
    return {(name, version) for name, version in lines if ours.fullmatch(name) or version.startswith("libcu")}


def _defined(library: Path) -> set[str]:
    lines = _output("nm", "--dynamic", "--defined-only", str(library)).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


def _library(name: str, folder: Path, wanted: set[tuple[str, str]]) -> Path:
    """Compile one library, whose symbols carry its name as their version, as CUDA's do."""
    with TemporaryDirectory() as temporary:
        script, generated = Path(temporary) / "versions", Path(temporary) / "stubs.c"
        script.write_text(f"{name} {{ global: *; }};\n")
        source = next((HERE / file for start, file in SOURCES.items() if name.startswith(start)), generated)
        if name.startswith(TENSORRT):
            source = HERE / "tensorrt.c"
        elif source is generated:
            generated.write_text("\n".join(_stub(symbol) for symbol, version in sorted(wanted) if version == name))
        versioned = [f"-Wl,--version-script={script}"] if name.startswith("libcu") else []
        counting = [f"-L{folder}", *(f"-l:{path.name}" for path in folder.glob("libcudart.so.*"))]
        links = [*counting, "-Wl,-rpath,$ORIGIN"] if source is generated else []
        flags = ["-O1", "-std=gnu11", "-shared", "-fPIC", f"-I{cuda_headers()}", f"-Wl,-soname,{name}"]
        target = folder / name
        subprocess.run(["gcc", *flags, *versioned, "-o", str(target), str(source), *links], check=True)
    return target


def _stub(symbol: str) -> str:
    return next(text.format(name=symbol) for pattern, text in STUBS.items() if re.fullmatch(pattern, symbol))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise SystemExit(f"no {command[0]}: install binutils") from error


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build CUDA libraries that compute nothing")
    parser.add_argument("folder", type=Path, help="where the libraries go; put it into LD_LIBRARY_PATH")
    parser.add_argument("--python", default=sys.executable, help="the Python that has onnxruntime-gpu (this one)")
    options = parser.parse_args()
    for path in build(onnxruntime_folder(options.python), options.folder):
        print(path)


if __name__ == "__main__":
    main()
