"""Methods of fine-tuning side by side: what each retains at equal target. Behind `flowstream compare`, and the demo."""
