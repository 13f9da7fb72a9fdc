#!/bin/sh
# Makes every run of a data set and a seed that results/ is meant to hold. It can be stopped, and goes on where it was
# when started again: runs that have their metrics.json are left out.
#
#     sh results/runs.sh shapes 0            # data set and seed
#     python final_evaluation.py --collect runs/shapes-cpu*/*
set -e
dataset=$1 seed=$2
cd "$(dirname "$0")/.."

# run RUN-FOLDER SCRIPT FLAGS...: makes the runs of one command, whose last one has this folder
run() {
    if [ ! -f "runs/$dataset-cpu$1-s$seed/metrics.json" ]; then
        shift
        echo "== $*"
        "${PYTHON:-python}" "$@" --dataset "$dataset" --seed "$seed" --budget cpu --resume
    fi
}

run /stage1-augmented stage1_baseline.py --variant vae uncond form1 guided augmented
run /stage2-anneal stage2_joint.py
run /stage2-anneal-grad-none stage2_joint.py --gradient none
run /stage3-flow-fixed stage3_adaptive.py --conditioning fixed
run /stage3-flow-film stage3_adaptive.py --conditioning film

# The other variants have seeds 0 to 2 on shapes, 0 elsewhere.
if [ "$seed" = 0 ] || { [ "$dataset" = shapes ] && [ "$seed" -lt 3 ]; }; then
    run /stage1-form2 stage1_baseline.py --variant form2
    run /stage2-sum stage2_joint.py --loss sum
    run /stage2-kendall stage2_joint.py --loss kendall
    run -diffusion_weight=0.003/stage2-anneal stage2_joint.py --set diffusion_weight=0.003
    run /stage3-flow-fade stage3_adaptive.py --conditioning fade
    run /stage3-flow-fade-posterior stage3_adaptive.py --conditioning fade --uncertainty posterior
    run /stage3-flow-coupling stage3_adaptive.py --conditioning coupling
    run /bonus-latent bonus_latent.py
fi
