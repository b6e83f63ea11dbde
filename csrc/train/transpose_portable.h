// 16 Vecs as the rows of a square, which become its columns.
static inline void transpose(Vec rows[kLanes]) {
  float lanes[kLanes][kLanes], columns[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(lanes[i], rows[i]);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) columns[j][i] = lanes[i][j];
  }
  for (int i = 0; i < kLanes; ++i) rows[i] = load(columns[i]);
}
