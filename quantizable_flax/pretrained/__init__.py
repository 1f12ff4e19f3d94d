"""Published models: folders of Hugging Face and timm, on disk or on the hub, without PyTorch."""
