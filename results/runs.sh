#!/bin/sh
# Makes every run of a data set and a seed that results/ holds (a file for each). It can be stopped, and goes on where it
# was when started again. A finished run is neither trained nor measured again (to measure it again, delete its
# metrics.json).
#
#     sh results/runs.sh shapes 0            # data set and seed; the committed runs had OMP_NUM_THREADS=1, two at a time
#     python final_evaluation.py --collect runs/shapes-cpu/*
set -e
dataset=$1 seed=$2
cd "$(dirname "$0")/.."
run() { echo "== $*"; "${PYTHON:-python}" "$@" --dataset "$dataset" --seed "$seed" --budget cpu --resume; }

# On shapes the main variants have seeds 0 to 4, on the others 0 to 2.
if [ "$dataset" = shapes ] || [ "$seed" = 0 ]; then
    run stage1_baseline.py --variant all
else
    run stage1_baseline.py --variant vae form1 guided augmented
fi
run stage2_joint.py
run stage2_joint.py --gradient none
run stage3_adaptive.py --conditioning fixed
run stage3_adaptive.py --conditioning film
if [ "$dataset" = shapes ] || [ "$seed" -lt 2 ]; then
    run stage2_joint.py --loss kendall
fi
if [ "$dataset" != cifar10 ] || [ "$seed" = 0 ]; then
    run stage2_joint.py --diffusion-weight 0.003
fi
if [ "$dataset" = shapes ] || [ "$seed" = 0 ]; then
    run bonus_latent.py
fi
if [ "$seed" = 0 ]; then
    run stage2_joint.py --loss sum
    run stage1_baseline.py --variant form1 --set even_levels=false
fi

case $dataset in
shapes)
    # This VAE is trained as long as that of --from-vae, and as long as VAE and refiner together.
    run stage1_baseline.py --variant vae form1 --set vae_steps=1650
    run stage1_baseline.py --variant form1 augmented --set vae_steps=1800 unet_steps=1200  # twice as many
    run stage2_joint.py --set vae_steps=1800 unet_steps=1200
    if [ "$seed" -lt 3 ]; then
        run stage1_baseline.py --variant form1 --set even_levels=false
        run stage2_joint.py --loss sum
        run stage2_joint.py --from-vae
        run stage3_adaptive.py --conditioning coupling
        run stage3_adaptive.py --conditioning fade
        for uncertainty in variance posterior; do
            run stage3_adaptive.py --conditioning fade --uncertainty $uncertainty
        done
        run stage1_baseline.py --variant form1 --set unet_steps=450  # how much sooner is the score of the plain loss had?
        run stage1_baseline.py --variant uncond --set unet_steps=1600  # as long as VAE and refiner take together
        run stage2_joint.py --gradient none --set vae_steps=1800 unet_steps=1200
        run stage1_baseline.py --variant vae --set vae_steps=3300  # as long as VAE and refiner with twice as many
        run stage2_joint.py --set vae_clip=0  # as kendall, whose gradients are too small to be clipped
        run stage1_baseline.py --variant form1 --set beta=0.02  # the best beta of each: half and twice the budget's
        run stage2_joint.py --set beta=0.08
    fi
    if [ "$seed" = 1 ] || [ "$seed" = 2 ]; then
        for uncertainty in variance posterior; do
            run stage3_adaptive.py --conditioning film --uncertainty $uncertainty
        done
    fi ;;
cifar10)
    if [ "$seed" = 0 ]; then
        for beta in 0.125 0.5; do  # half and twice the budget's
            run stage1_baseline.py --variant form1 --set beta=$beta
            run stage2_joint.py --set beta=$beta
        done
        run stage2_joint.py --diffusion-weight 0.1
        run stage2_joint.py --gradient decoder
        run stage1_baseline.py --variant vae --set vae_steps=12000  # as long as VAE and refiner together
        run stage3_adaptive.py --conditioning coupling
        run stage3_adaptive.py --conditioning fade
        run stage3_adaptive.py --conditioning fade --uncertainty posterior
        run stage3_adaptive.py --uncertainty variance
    fi
    run stage1_baseline.py --variant uncond --set unet_steps=8000 ;;  # as long as both
celeba64)
    if [ "$seed" = 0 ]; then
        run stage2_joint.py --from-vae
        run stage2_joint.py --diffusion-weight 0.001
        run stage2_joint.py --diffusion-weight 0.1
        run stage2_joint.py --gradient decoder
        run stage2_joint.py --loss bound
        run stage1_baseline.py --variant uncond --set unet_steps=4000  # about as long as VAE and refiner together
        run stage1_baseline.py --variant form1 --set unet_steps=3000  # does the refiner need more steps?
        run stage1_baseline.py --variant form1 --set vae_steps=3000  # or the VAE?
        run stage3_adaptive.py --conditioning coupling
        run stage3_adaptive.py --conditioning fade
        run stage3_adaptive.py --conditioning fade --uncertainty posterior
        run stage3_adaptive.py --uncertainty variance
    fi
    if [ "$seed" -lt 2 ]; then
        run stage1_baseline.py --variant form1 --set even_levels=false
        run stage1_baseline.py --variant form1 --set vae_steps=4600 unet_steps=4600  # twice as many
        run stage2_joint.py --set vae_steps=4600 unet_steps=4600
    fi ;;
esac

if [ "$dataset" = shapes ] && [ "$seed" = 0 ]; then
    for weight in 0.001 0.01 0.1 1; do
        run stage2_joint.py --diffusion-weight $weight
    done
    run stage1_baseline.py --variant form1 --set beta=0.08
    run stage2_joint.py --set beta=0.02
    run stage2_joint.py --gradient decoder
    run stage2_joint.py --loss bound
    run stage2_joint.py --loss bound --gradient none
    run stage1_baseline.py --variant vae --set beta=2  # weighs squared error and KL as `bound` does
    # The published settings, but for the sizes, the number of steps and the sampler; with ten times the steps; and each
    # of them alone (even_levels=false is run above)
    published="start=1000 objective=eps even_levels=false beta=1 vae_muon_lr=0 unet_muon_lr=0"
    run stage1_baseline.py --variant form1 --set $published
    run stage1_baseline.py --variant form1 --set $published vae_steps=9000 unet_steps=6000
    for change in start=1000 objective=eps beta=1 "vae_muon_lr=0 unet_muon_lr=0"; do
        run stage1_baseline.py --variant form1 --set $change
    done
fi
