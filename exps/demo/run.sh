#!/usr/bin/env bash
# The demo: makes synthetic voices, trains on them with the real command, and scores voices never trained on.
set -euo pipefail
cd "$(dirname "$0")/../.."
. exps/demo/environment.sh requirements.txt

python exps/demo/voices.py --out exps/demo/data
python trainECAPAModel.py @exps/demo/options.txt
model=$(ls exps/demo/result/model/model_*.model | tail -n 1)
python trainECAPAModel.py @exps/demo/options.txt --eval --initial_model "$model"

cat <<EOF

exps/demo/result/score.txt, a line per test:
$(cat exps/demo/result/score.txt)

corpus       exps/demo/data (laid out as VoxCeleb, MUSAN and RIRS_NOISES are)
recipe       exps/demo/options.txt
checkpoints  exps/demo/result/model
To begin again, remove exps/demo/result; README.md tells how to train on VoxCeleb or on your own speakers.
EOF
