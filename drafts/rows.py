"Reading and lesson rows by the code of make_tiny_models, as numpy files. python drafts/rows.py reading|lessons FOLDER"
import json, sys, numpy as np, torch
nb=json.load(open('nbs/recipes/make_tiny_models.ipynb'))
cells=[''.join(c['source']) for c in nb['cells'] if c['cell_type']=='code']
src=[]
for c in cells:
    if 'start_run(' in c: c='from pathlib import Path\nfolder=Path("runs/tiny")\n'
    if c.startswith('tokenizer_path'): c='from distillbook.lab.models import load_tokenizer\ntokenizer=load_tokenizer("teacher")\n'
    if c.startswith('base_example') : continue
    if c.startswith('base_path'): continue
    if c.startswith('teacher_path'): break
    src.append(c)
exec('\n'.join(src))
batch_rows=8
which=sys.argv[1]
if which=='reading': rows=base_rows(1400,0,3)      # 11,200 rows of 512
else: rows=teacher_rows(1000,100,3)
out={}
def padded(r, L):
    n=len(r['input_ids']); f=lambda v,x: np.pad(np.asarray(v),(0,L-n),constant_values=x)
    return f(r['input_ids'],0), f(r['labels'],-100), f(r.get('position_ids',range(n)),0)
for lo,L in ((0,512),(512,1024)):
    part=[padded(r,L) for r in rows if lo<len(r['input_ids'])<=L]
    if not part: continue
    i,l,p=(np.stack(x) for x in zip(*part))
    out[f'ids{L}']=i.astype(np.uint16); out[f'counts{L}']=np.packbits(l!=-100,axis=None); out[f'pos{L}']=p.astype(np.uint16)
np.savez_compressed(f'{sys.argv[2]}/{which}.npz',**out)
print({k:v.shape for k,v in out.items()})
