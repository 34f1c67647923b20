# The main job, run from the repository's folder: bash {out}/run.sh
# After an interruption run it again: it continues where it stopped.
set -e
trap "exit 1" INT  # Ctrl-C ends a training after its step, and then this script

echo "1. cold start"
python sft.py @{out}/sft.args --resume
python evaluate.py @{out}/evaluate.args --model {out}/sft --output {out}/eval_sft --order ordered shuffled

echo "2. T-GRPO"
python tgrpo.py @{out}/tgrpo.args --resume
python evaluate.py @{out}/evaluate.args --model {out}/tgrpo --output {out}/eval_tgrpo --order ordered shuffled

echo "3. before (A) and after (B)"
python evaluate.py --diff {out}/eval_sft {out}/eval_tgrpo
