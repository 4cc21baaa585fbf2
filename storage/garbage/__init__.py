"""What a store holds that nobody needs: taking stock, deciding, deleting."""
