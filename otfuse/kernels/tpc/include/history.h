// What is kept of a round for the backward, private to these kernels: u, v, and where the form is ABSORBED what was
// folded into K. Blocks of 64 one after the other, as they lie in local memory.

static inline void record(shape s, vectors p, tensor history, int item, int slot, int form) {
  if (slot < 0) return;
  int at = 0;
  for (int k = 0; k < s.row_blocks; k++, at += 64) v_f32_st_tnsr(place(at, slot, item), history, local[p.u + k]);
  for (int k = 0; k < s.column_blocks; k++, at += 64) v_f32_st_tnsr(place(at, slot, item), history, local[p.v + k]);
  if (form == 0) return;
  for (int k = 0; k < s.row_blocks; k++, at += 64) v_f32_st_tnsr(place(at, slot, item), history, local[p.log_u + k]);
  for (int k = 0; k < s.column_blocks; k++, at += 64) v_f32_st_tnsr(place(at, slot, item), history, local[p.log_v + k]);
}

// The scalings of a slot; and what was folded into K then, for the ABSORBED form: K is to be filled again.
static inline void restore_columns(shape s, tensor history, int item, int slot, int v) {
  for (int k = 0; k < s.column_blocks; k++)
    local[v + k] = v_f32_ld_tnsr_b(place(64 * (s.row_blocks + k), slot, item), history);
}
static inline void restore_scalings(shape s, vectors p, tensor history, int item, int slot) {
  for (int k = 0; k < s.row_blocks; k++) local[p.u + k] = v_f32_ld_tnsr_b(place(64 * k, slot, item), history);
  restore_columns(s, history, item, slot, p.v);
}
static inline void restore_folded_columns(shape s, tensor history, int item, int slot, int log_v) {
  const int first = 2 * s.row_blocks + s.column_blocks;
  for (int k = 0; k < s.column_blocks; k++)
    local[log_v + k] = v_f32_ld_tnsr_b(place(64 * (first + k), slot, item), history);
}
static inline void restore_folds(shape s, vectors p, tensor history, int item, int slot) {
  const int first = s.row_blocks + s.column_blocks;
  for (int k = 0; k < s.row_blocks; k++)
    local[p.log_u + k] = v_f32_ld_tnsr_b(place(64 * (first + k), slot, item), history);
  restore_folded_columns(s, history, item, slot, p.log_v);
}
