"""What is said of batch normalization, put to the test: ``python -m benchmarks claims``.

Eight claims, each a number, a picture and a sentence that says whether it held. learning.py trains
the network of the MNIST experiment in "Batch normalization: accelerating deep network training by
reducing internal covariate shift" (Ioffe and Szegedy, 2015) on scikit-learn's handwritten digits;
arithmetic.py needs no training.
"""
