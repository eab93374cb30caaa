"""A page to try a trained model, with one file for each tab: python -m transfusion_mot.demo --checkpoint runs/emoji"""
