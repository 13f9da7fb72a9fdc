#!/bin/sh
# Every run of a data set and a seed that results/ holds (a file for each), and some that it does not hold yet. It can be
# stopped, and goes on where it was when started again. A finished run is neither trained nor measured again (to measure
# it again, delete its metrics.json).
#
#     sh results/runs.sh shapes 0            # data set and seed; the committed runs had OMP_NUM_THREADS=1, two at a time
#     python final_evaluation.py --collect runs/shapes-cpu/*
set -e
dataset=$1 seed=$2
cd "$(dirname "$0")/.."
run() { echo "== $*"; "${PYTHON:-python}" "$@" --dataset "$dataset" --seed "$seed" --budget cpu --resume; }

if [ "$dataset" = shapes ] || [ "$seed" = 0 ]; then
    run stage1_baseline.py --variant all
else
    run stage1_baseline.py --variant vae form1 guided augmented
fi
run stage2_joint.py
run stage2_joint.py --gradient none
run stage2_joint.py --loss kendall
run stage3_adaptive.py --conditioning fixed
run stage3_adaptive.py --conditioning film
if [ "$dataset" = shapes ] || [ "$seed" = 0 ]; then
    run bonus_latent.py
fi
if [ "$dataset" = shapes ] && [ "$seed" -lt 3 ] || [ "$seed" = 0 ]; then
    run stage3_adaptive.py --conditioning fade
    run stage3_adaptive.py --conditioning coupling
    run stage1_baseline.py --variant form1 --set even_levels=false
    run stage2_joint.py --loss sum
    run stage2_joint.py --from-vae
fi
if [ "$dataset" = shapes ]; then
    run stage1_baseline.py --variant form1 --set vae_steps=1650  # its VAE is trained as long as that of --from-vae
    run stage1_baseline.py --variant form1 augmented --set vae_steps=1800 unet_steps=1200  # twice as many
    run stage2_joint.py --set vae_steps=1800 unet_steps=1200
fi
if [ "$dataset" = shapes ] && [ "$seed" -lt 3 ]; then
    run stage2_joint.py --gradient none --set vae_steps=1800 unet_steps=1200
    run stage1_baseline.py --variant form1 --set unet_steps=450  # how much sooner is the score of the plain loss had?
    run stage1_baseline.py --variant uncond --set unet_steps=1600  # as long as VAE and refiner take together
fi
if [ "$dataset" != cifar10 ] || [ "$seed" = 0 ]; then
    run stage2_joint.py --diffusion-weight 0.003
fi
if [ "$dataset" = shapes ] && [ "$seed" -lt 3 ]; then
    run stage2_joint.py --set vae_clip=0  # as kendall, whose gradients are too small to be clipped
    for uncertainty in variance posterior; do
        run stage3_adaptive.py --conditioning fade --uncertainty $uncertainty
        run stage3_adaptive.py --conditioning film --uncertainty $uncertainty
    done
fi
if [ "$dataset" = celeba64 ] && [ "$seed" = 0 ]; then
    run stage1_baseline.py --variant form1 --set unet_steps=3000  # does the refiner need more steps?
    run stage1_baseline.py --variant form1 --set vae_steps=3000  # or the VAE?
fi
if [ "$dataset" = celeba64 ] && [ "$seed" = 1 ]; then
    run stage1_baseline.py --variant form1 --set even_levels=false
fi

# The rest is for seed 0: other losses, reaches of the gradient and kinds of uncertainty, and one setting changed at a time.
[ "$seed" = 0 ] || exit 0
case $dataset in
shapes)
    for weight in 0.001 0.01 0.1 1; do
        run stage2_joint.py --diffusion-weight $weight
    done
    run stage2_joint.py --loss bound
    run stage2_joint.py --loss bound --gradient none
    run stage1_baseline.py --variant vae --set beta=2  # weighs squared error and KL as `bound` does
    run stage2_joint.py --gradient decoder
    for beta in 0.02 0.08; do
        run stage1_baseline.py --variant form1 --set beta=$beta
        run stage2_joint.py --set beta=$beta
    done
    run stage1_baseline.py --variant form1 --set beta=0.08 start=300  # a blurrier VAE, whose refined images have less grain
    # The published settings, but for the sizes, the number of steps and the sampler.
    run stage1_baseline.py --variant form1 --set start=1000 objective=eps even_levels=false beta=1 vae_muon_lr=0 unet_muon_lr=0
    for change in start=300 start=500 start=1000 unet_steps=1200 vae_steps=1800 unet_muon_lr=0.01 unet_muon_lr=0.04 \
                  unet_muon_lr=0 objective=eps components=3000; do
        run stage1_baseline.py --variant form1 --set $change
    done
    for guidance in 0.25 1; do
        run stage1_baseline.py --variant guided --set guidance=$guidance
    done ;;
cifar10)
    for beta in 0.125 0.5; do
        run stage1_baseline.py --variant form1 --set beta=$beta
        run stage2_joint.py --set beta=$beta
    done ;;
celeba64)
    run stage1_baseline.py --variant form1 --set vae_steps=4600 unet_steps=4600  # twice as many
    run stage2_joint.py --set vae_steps=4600 unet_steps=4600 ;;
esac
