"""The paper's experiments, on the loop of `translution.paper.training`: Dynamic MNIST, language, ImageNet's recipe."""
