// A chain of layers of an engine that runs image by image, in one layout, with nothing of PyTorch in between.
//
// Tensors lie row by row, all channels of a row one after another, or, where rows are short, as planes, so far apart
// that the zeros around an image are there for every tap of the layers that read it: a kept weight is one offset into
// the tensor, and no layer copies its input. Those with a stride do, unless the layer before them can write its output
// as that copy. Tensors of one height and width share the layout, hence a layer's output is at the same place of its
// row or plane as what it came from. The exception are tensors that no tap reaches beyond: they have no zeros between
// their rows, of which several are a run, or all a plane; and what is computed the one way for a tensor of the other
// kind changes places when it is stored.
//
// Tensors share memory as soon as they are not read any more; who writes one writes the zeros around it, too. What is
// stored pixel by pixel shares it with its like alone, and zeros stay.
//
// A layer is finished for an image before the next one begins: no part of its output is pushed on. Tensors that no
// cache nearby holds as a whole are read from their end on, since that was written last.
//
// The last layers' planes may be so small that registers are half empty. There, tensors hold two images side by side,
// row by row: layers up to there run for the one, then for the other, and the rest, the tail, for both at once.
//
// Every thread computes images of its own. The last ones, of which there are too few for that, are shared by two
// threads each: both compute the same rows in every layer, so that they find them in their own caches. (If there is a
// tail, threads have one image each up to there, and share the rest.) Where half a tensor fits these and a whole one
// does not, that can be faster for all images; without a tail, small layers at the end of the chain, which have no rows
// to share out, stay a matter of one thread.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/conv2d.h"
#include "cpu/packed_weight.h"
#include "cpu/walk.h"
#include "ops.h"

namespace sparsekit {

class Program {
 public:
  struct Size {
    int64_t channels, h, w;
    bool operator==(const Size&) const = default;
  };

  static constexpr int64_t kNone = INT64_MAX;  // no tensor

  // Tensors are numbered from 0, inputs -1, -2, ... Layers run in the order in which they are added; a tensor is
  // written once, before it is read.
  Program(std::vector<Size> tensors, std::vector<Size> inputs, std::vector<Size> outputs);
  ~Program();

  void add_load(int64_t in, int64_t out);
  // How the work of a sparse layer is cut, where that is not what its sizes ask for.
  struct Blocking {
    double channels = 1;        // of a block, over those that fit the first-level cache
    bool other_strips = false;  // long ones in place of short ones, or the other way around
    bool pairs = true;          // taps beside their lanes may be added by shifting sums
  };
  // The weight is read until finish(). dense: it is computed as if nothing of it were zero, if it has one group, which
  // it must, and either the CPU has tiles, which it fills, or most of it is kept.
  void add_conv2d(const Conv2dGeometry& g, const Csr& weight, bool dense, int64_t in, int64_t out, int64_t residual,
                  const Epilogue& epilogue, const Blocking& blocking);
  void add_max_pool2d(const Pool2dGeometry& g, int64_t in, int64_t out);
  void add_avg_pool2d(const Pool2dGeometry& g, bool count_padding, int64_t in, int64_t out);
  // The mean over the pixels of every channel.
  void add_mean(int64_t in, int64_t out);
  // out = activation(clamp(in * scale * gate + shift + other)). Per channel: scale and shift, empty for ones and zeros,
  // and the tensor `gate`, of one pixel; it and `other` may be kNone.
  struct Elementwise {
    std::vector<float> scale, shift;
    int64_t gate, other;
    float low, high;
    Activation activation;
  };
  void add_elementwise(Elementwise e, int64_t in, int64_t out);
  // Channels of `out` are `channels` of all those of `in`, one tensor after another.
  void add_gather(const std::vector<int64_t>& in, const std::vector<int64_t>& channels, int64_t out);
  void add_store(int64_t in, int64_t output);
  // single: it is made for one image at a time, which threads share.
  void finish(bool single);

  // Several threads may call it at once. share: whether threads share every image. seconds: nullptr, or those of every
  // layer, in the order in which they were added, to which what all threads took together is added.
  void run(const std::vector<Images>& inputs, const std::vector<Images>& outputs, int64_t images, bool share,
           double* seconds);

  // Once finished, the values of a convolution's weight, given what else it had; false if the program has not kept
  // them.
  bool values(int64_t layer, const Csr& weight, float* to) const;
  // Whether it has kept them.
  bool holds(int64_t layer, const Csr& weight) const;

  const Size& size(int64_t tensor) const { return tensor < 0 ? inputs_.at(-1 - tensor) : tensors_.at(tensor).size; }
  const std::vector<Size>& inputs() const { return inputs_; }
  const std::vector<Size>& outputs() const { return outputs_; }
  int64_t layers() const { return layers_.size(); }
  // Of memory that an image takes on its way, or two that the tail computes at once; once finished.
  int64_t floats() const { return floats_; }

 private:
  // What the tensors of one height and width have in common. A tensor is [runs][channels][channel] floats, and a run as
  // many rows as all have.
  struct Layout {
    int64_t h, w;
    bool flat;                           // without zeros between rows
    int64_t side = 0, up = 0, down = 0;  // zeros that taps reach to the left and right, above and below
    int64_t packed_side = 0;             // the same of packed copies
    int64_t images = 1;                  // side by side
    int64_t step = 0;                    // floats from one of them to the next
    int64_t pitch = 0;                   // floats of a row
    int64_t runs = 1;                    // h, where tensors lie row by row; h / rows
    int64_t rows = 0;                    // of a run, where those are flat: whole registers; else 0
    int64_t channel = 0;                 // floats from a channel of a run to the next
    int64_t lanes = 0;                   // of these, that are computed: whole registers
    int64_t lead = 0;                    // floats before the first pixel
    bool shifting = false;               // PackedWeight may use it
    std::vector<int32_t> mask;           // of a strip, 0 where there is no pixel; empty where all are
  };
  struct Term;
  struct Conv;
  struct Tensor {
    Size size;
    int64_t layout;
    bool halo = false;         // taps reach beyond it
    bool even = false;         // somebody wants all of its rows equally far apart
    bool keeps_zeros = false;  // around it, for nothing else is ever in their places
    Term* packed = nullptr;    // it is there as its packed source alone
    int64_t last = -1;         // layer that reads it
    int64_t at = 0;            // its first pixel in an image's memory
  };
  struct Layer {
    std::vector<int64_t> reads;
    int64_t writes;                   // or kNone
    int64_t in_place = kNone;         // tensor whose memory the written one may take over
    std::function<void()> add_steps;  // once memory is laid out
    bool lanewise = false;            // what it reads and writes has one layout, where it has one size
    bool single = false;              // it is not for images side by side
  };
  // Images on their way: one, or two that the tail computes at once.
  struct Frame {
    float* memory;
    float* tail;  // the memory where the tail finds them
    const std::vector<Images>* inputs;
    const std::vector<Images>* outputs;
    int64_t image, count;  // the first, and how many
    int64_t at = 0;        // which of them it is about
  };
  // Work on items [first, last) of some number.
  using Work = std::function<void(const Frame&, int64_t first, int64_t last)>;
  struct Step {
    int64_t items;
    Work run;
    bool backwards = false;    // item by item, the last first
    int64_t shared_items = 0;  // the same work for threads that share an image, if it is not cut in the same way
    Work shared_run = nullptr;
    int64_t layer = kNone;
  };
  // Memory that is taken while layers [first, last] run.
  struct Use {
    int64_t at, floats, first, last;
  };
  struct Range {
    int64_t first, count;
  };
  // Lanes that spmm computes at once: some of a plane or run, or `rows` whole runs.
  struct Strip {
    int64_t index, row, rows, lane, lanes;
  };
  class Memory;
  class Team;

  int64_t layout_of(int64_t h, int64_t w, bool flat);
  void add_layer(Layer layer);
  void add_runs(std::vector<int64_t> reads, int64_t writes, int64_t in_place,
                std::function<void(const Frame&, int64_t channel, int64_t run)> f);
  std::vector<int64_t> count_readers() const;
  void join_residuals();
  bool is_far(int64_t tensor) const;
  bool reads_backwards(const Term& term) const;
  bool has_room(const Layout& layout) const;
  void choose_tail();
  bool side_by_side(int64_t tensor) const { return tensor >= 0 && layout(tensor).images > 1; }
  void set_layout(Layout& layout, bool single) const;
  void choose_layouts(bool single);
  void choose_blocks(Conv& conv);
  void choose_halves();
  void place_tensors();
  int64_t reserve(int64_t floats, int64_t first, int64_t last);
  Work with_zeros(int64_t items, int64_t writes, Work work) const;
  Work for_each_image(Work work) const;
  std::vector<Step>& steps() { return in_tail_ ? tail_ : steps_; }
  void add_step(int64_t items, int64_t writes, Work work);
  void clear_around(const Frame& frame, int64_t tensor, bool above, bool below) const;
  void clear_beside(const Frame& frame, int64_t tensor, int64_t first, int64_t last) const;
  const Layout& layout(int64_t tensor) const { return layouts_[tensors_[tensor].layout]; }
  float* data(const Frame& frame, int64_t tensor) const;
  int64_t run_stride(int64_t tensor) const { return tensors_[tensor].size.channels * layout(tensor).channel; }
  int64_t row_stride(int64_t tensor) const {
    return layout(tensor).runs > 1 ? run_stride(tensor) : layout(tensor).pitch;
  }
  int64_t row_at(int64_t tensor, int64_t y) const;
  float* lanes(const Frame& frame, int64_t tensor, int64_t channel, int64_t run) const;
  Images images(const Frame& frame, int64_t tensor, int64_t y = 0) const;
  void add_paired_steps(const Conv& conv);
  void add_tiled_steps(Conv& conv);
  void add_conv_steps(Conv& conv);
  bool is_paired(const Conv& conv) const;
  bool choose_moves(Conv& conv) const;
  std::vector<Halves> halves_of(const Layout& from, const Walk& walk) const;
  int64_t strip_vectors(const Conv& conv) const;
  bool fits_whole(const Conv& conv) const;
  void choose_strips(Conv& conv);
  bool even_parts(const Conv& conv) const;
  Strip strip(const Conv& conv, int64_t index, int64_t strips) const;
  void shift_half_lines(Term& term, int64_t layer);
  Work copy_rows(Walk walk, int64_t in, Range channels, std::function<float*(const Frame&)> block, int64_t step,
                 const Layout* flat) const;
  Work copy_beside(const Conv& conv);
  void add_copy(Walk walk, int64_t in, Range channels, std::function<float*(const Frame&)> block, int64_t step = 0,
                bool zeros_alone = false, const Layout* flat = nullptr);
  void run_conv(const Conv& conv, const Term& term, const Frame& frame, const float* source, Range blocks,
                const Strip& strip, Range splits, float* parts = nullptr) const;
  template <class F>
  bool of_weight(int64_t layer, const F& f) const;
  std::unique_ptr<Memory> take_memory();
  void give_back(std::unique_ptr<Memory> memory);

  std::vector<Size> inputs_, outputs_;
  std::vector<Layout> layouts_;
  std::vector<Tensor> tensors_;
  std::vector<std::unique_ptr<Conv>> convs_;
  std::vector<Layer> layers_;
  std::vector<Step> steps_, tail_;  // the tail's are for images that are side by side
  size_t first_of_tail_ = 0;        // layer, or as many as there are
  bool in_tail_ = false;            // whether steps that are added are the tail's
  size_t alone_ = 0;                // of the steps, those from here on have no rows to share out
  int64_t floats_ = 0;              // of an image's memory
  std::vector<Use> uses_;           // of it, by place, until finished

  std::mutex mutex_;
  std::vector<std::unique_ptr<Memory>> free_;  // memory that no image has at hand
};

}  // namespace sparsekit
