"""A page to play with a trained model, a file for each tab: python -m transfusion_mot.demo --checkpoint runs/emoji"""
