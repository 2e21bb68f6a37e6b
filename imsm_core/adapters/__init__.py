"""PEFT adapters on the frozen backbone: methods, configs, what is refused, and attaching them."""
