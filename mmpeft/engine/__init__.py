"""What runs with the mmengine Runner."""
