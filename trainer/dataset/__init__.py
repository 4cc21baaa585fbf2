"""A data set as files: what is in it, what is wrong with it, and where it comes from. Imports no torch.

sources    where it is written to lie, made into a folder on this machine
folder     that folder's images, each with caption and concept; its digest
captions   what its metadata and the files beside its images say
concepts   which settings an image has by the subfolder that it lies in
images     decoding images and masks
survey     what somebody wants to know before training on it, and whether it can be trained on
"""
