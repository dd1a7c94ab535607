#!/usr/bin/env bash
# The classification benchmark on CIFAR-10 with ResNet-18, on one GPU or TPU chip. The same command again goes on.
#
#   EUPMU_CIFAR=FOLDER experiments/cloud/cifar10.sh [cuda13|cuda12|tpu] [OUT]
#
# FOLDER holds cifar-10-python.tar.gz as its authors publish it; where tensorflow-datasets has prepared cifar10 in the
# format array_record already, EUPMU_CIFAR may be any folder.
set -euo pipefail
: "${EUPMU_CIFAR:?the folder of cifar-10-python.tar.gz}"
pip install --quiet ".[experiments]" "jax[${1:-cuda13}]"
eupmu benchmark classification --design cifar10-resnet18 --out "${2:-eupmu_runs/cifar10-resnet18}"
