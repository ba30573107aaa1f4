int in_an_example;
