"""XLA program texts of forms that the CPU compiler does not print."""

# ruff: noqa: E501 (an instruction is one line)

SIXTEEN = "HloModule m, is_scheduled=true, num_partitions=16\n\n"
ADD = """%add (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %q = f32[] parameter(1)
  ROOT %sum = f32[] add(%p, %q)
}

"""


KNOWN_TRIPS = (
    SIXTEEN
    + ADD
    + """%test_psum (s: (s32[], f32[64])) -> pred[] {
  %s = (s32[], f32[64]{0}) parameter(0)
  %v = f32[64]{0} get-tuple-element(%s), index=1
  %r = f32[64]{0} all-reduce(%v), channel_id=1, replica_groups=[1,16]<=[16], to_apply=%add, metadata={op_name="test"}
  ROOT %go = pred[] custom-call(%r), custom_call_target="less"
}

%body (s.1: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s.1 = (s32[], f32[64]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s.1), index=0
  %v.1 = f32[64]{0} get-tuple-element(%s.1), index=1
  %r.1 = f32[64]{0} all-reduce(%v.1), channel_id=2, replica_groups={}, to_apply=%add, metadata={op_name="body"}
  ROOT %t = (s32[], f32[64]{0}) tuple(%i, %r.1)
}

ENTRY %main (x: (s32[], f32[64])) -> (s32[], f32[64]) {
  %x = (s32[], f32[64]{0}) parameter(0)
  ROOT %loop = (s32[], f32[64]{0}) while(%x), condition=%test_psum, body=%body, metadata={op_name="jit(f{)/while"}, backend_config={"known_trip_count":{"n":"6"}}
}
"""
)

# Pieces shortened from programs compiled for H100 (start/done pairs, false_computation) and TPU v5p (tiled layouts).
ASYNC = (
    SIXTEEN
    + ADD
    + """%taken (p.1: (bf16[1024,512])) -> (bf16[1024,512]) {
  %p.1 = (bf16[1024,512]{1,0}) parameter(0)
  %g = bf16[1024,512]{1,0} get-tuple-element(%p.1), index=0
  %a2a = ((bf16[1024,512]{1,0}), bf16[1024,512]{1,0}) all-to-all-start(%g), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}, dimensions={0}, metadata={op_name="jit(f)/all_to_all" \
scheduling_name="a"}, backend_config={"collective_backend_config":{"is_sync":true,"backend":"DEFAULT"}}
  %a2a-done = bf16[1024,512]{1,0} all-to-all-done(%a2a), metadata={op_name="jit(f)/all_to_all"}
  ROOT %t = (bf16[1024,512]{1,0}) tuple(%a2a-done)
}

%passed (p.2: (bf16[1024,512])) -> (bf16[1024,512]) {
  ROOT %p.2 = (bf16[1024,512]{1,0}) parameter(0)
}

%wrapped (p.3: bf16[1024,512]) -> bf16[16384,512] {
  %p.3 = bf16[1024,512]{1,0} parameter(0)
  ROOT %ag = bf16[16384,512]{1,0} all-gather(%p.3), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}
}, execution_thread="parallel"

ENTRY %main (x: bf16[1024,512], yes: pred[], o: s64[16]) -> bf16[1024,512] {
  %x = bf16[1024,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %yes = pred[] parameter(1)
  %o = s64[16]{0} parameter(2)
  %t.1 = (bf16[1024,512]{1,0}) tuple(%x)
  %c = (bf16[1024,512]{1,0}) conditional(%yes, %t.1, %t.1), true_computation=%taken, false_computation=%passed
  %rs = ((bf16[1024,512]{1,0}), bf16[128,512]{1,0}) reduce-scatter-start(%x), channel_id=1, \
replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%add
  %cp = (bf16[1024,512]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,8},{1,1}}, \
backend_config={"debug":"\\nRing{colors:1 cores:{8, \\"x\\"","lists":[]}
  %ar = bf16[1024,512]{1,0} all-reduce-start(%x), channel_id=1, replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
  %ar-done = bf16[1024,512]{1,0} all-reduce-done(%ar)
  %ra = ((bf16[1024,512]{1,0}, bf16[1024,512]{1,0}, s64[16]{0}, s64[16]{0}, s64[16]{0}, /*index=5*/s64[16]{0}), \
bf16[1024,512]{1,0}) ragged-all-to-all-start(%x, %x, %o, %o, %o, /*index=5*/%o), channel_id=1, \
replica_groups=[1,16]<=[16]
  %ra-done = bf16[1024,512]{1,0} ragged-all-to-all-done(%ra)
  %ag-start = ((bf16[1024,512]{1,0}), bf16[16384,512]{1,0}, u32[]) async-start(%x), calls=%wrapped
  %ag-done = bf16[16384,512]{1,0} async-done(%ag-start), calls=%wrapped
  %cp-done = bf16[1024,512]{1,0:T(8,128)(2,1)} collective-permute-done(%cp)
  ROOT %rs-done = bf16[128,512]{1,0} reduce-scatter-done(%rs)
}
"""
)
