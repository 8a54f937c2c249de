"""The networks, one plain file each; they take attention and cache as arguments and know no request or
setting.
"""
