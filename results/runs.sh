#!/bin/sh
# Makes every run of a data set and a seed that results/ is meant to hold. It can be stopped, and goes on where it was
# when started again: runs that have their metrics.json are left out.
#
#     sh results/runs.sh shapes 0            # data set and seed
#     python final_evaluation.py --measure runs/shapes-cpu*/*
#     python final_evaluation.py --times runs/shapes-cpu/*      # on a machine that does nothing else
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

# The main variants: shapes with seeds 0 to 4, photographs with seeds 0 to 2
run /stage1-augmented stage1_baseline.py --variant vae uncond form1 guided augmented
run /stage2-anneal stage2_joint.py
run /stage2-anneal-grad-none stage2_joint.py --gradient none
run /stage3-flow-film stage3_adaptive.py --conditioning film
run /stage3-flow-fixed stage3_adaptive.py --conditioning fixed
if [ "$seed" -gt 2 ]; then
    exit
fi

# Rivals, trained for about the minutes of VAE and refiner together
case $dataset in
    shapes) steps=1100 ;;
    *) steps=3000 ;;
esac
if [ "$dataset" != cifar10 ] || [ "$seed" = 0 ]; then
    run -vae_steps=$steps/stage1-vae stage1_baseline.py --variant vae --set vae_steps=$steps
    run -unet_steps=$steps/stage1-uncond stage1_baseline.py --variant uncond --set unet_steps=$steps
fi

# The other variants: shapes with seeds 0 to 2, photographs with seed 0
if [ "$dataset" != shapes ] && [ "$seed" != 0 ]; then
    exit
fi
run /bonus-latent bonus_latent.py
run -diffusion_weight=0.03/stage2-anneal stage2_joint.py --set diffusion_weight=0.03
run -diffusion_weight=0.3/stage2-anneal stage2_joint.py --set diffusion_weight=0.3
run /stage2-sum stage2_joint.py --loss sum
run /stage2-kendall stage2_joint.py --loss kendall
run /stage2-bound stage2_joint.py --loss bound
run -beta=2.06/stage1-form1 stage1_baseline.py --set beta=2.06  # the weight of the KL that `bound` amounts to
run /stage3-flow-fade stage3_adaptive.py --conditioning fade
run /stage3-flow-fade-posterior stage3_adaptive.py --conditioning fade --uncertainty posterior
run /stage3-flow-coupling stage3_adaptive.py --conditioning coupling
run /stage1-form2 stage1_baseline.py --variant form2

# What departs from the paper, one at a time: shapes with seed 0
if [ "$dataset" != shapes ] || [ "$seed" != 0 ]; then
    exit
fi
for change in beta=1.0 objective=eps "vae_muon_lr=0.0 unet_muon_lr=0.0" start=1000 even_levels=false; do
    run "-$(echo "$change" | sed 's/ /-/; s/false/False/')/stage1-form1" stage1_baseline.py --set $change
done
