"""All that knows torchtune."""
