// What is kept of a round for the backward, private to these kernels: u, v, and where the form is ABSORBED what was
// folded into K. Blocks of 64 one after the other, as they lie in local memory.

static void record(shape s, vectors p, tensor history, int item, int slot, int form) {
  if (slot < 0) return;
  int at = 0;
  for (int k = 0; k < s.row_blocks; k++, at += 64) v_f32_st_tnsr(place(at, slot, item), history, local[p.u + k]);
  for (int k = 0; k < s.column_blocks; k++, at += 64) v_f32_st_tnsr(place(at, slot, item), history, local[p.v + k]);
  if (form == 0) return;
  for (int k = 0; k < s.row_blocks; k++, at += 64) v_f32_st_tnsr(place(at, slot, item), history, local[p.log_u + k]);
  for (int k = 0; k < s.column_blocks; k++, at += 64) v_f32_st_tnsr(place(at, slot, item), history, local[p.log_v + k]);
}
