"""A Sequential that also hands out the feature map after each max-pool: the skip connections of a U-Net."""

from torch import nn


class Sequential(nn.Sequential):
    """``nn.Sequential`` with the same modules, results and state-dict keys, and one more argument."""

    def forward(self, x, get_features=False):
        """Run the modules in order.

        Args:
            x: input of the first module, for images (B, C, H, W).
            get_features: also return the outputs of all ``nn.MaxPool2d`` members, in order.

        Returns:
            the output; with ``get_features`` a pair (output, list of feature maps), for VGG19 f1..f5 at
            1/2 .. 1/32 of the input size.
        """
        features = []
        for module in self:
            x = module(x)
            if get_features and isinstance(module, nn.MaxPool2d):
                features.append(x)
        return (x, features) if get_features else x
