"""What a recipe needs and how long it takes: memory and speed, predicted. A roofline, tensor by tensor."""
