#pragma once

#include "headroom/core/attention/backward.hpp"
#include "headroom/core/attention/pass.hpp"
#include "headroom/core/attention/reductions.hpp"

namespace headroom::inline v0::core::detail::inline HEADROOM_ISA {

/// The backward pass of all heads: which worker takes which strips, what they share, and in which order sums are added.
template <class Scalar>
class BackwardPass final : public Pass {
  using Worker = BackwardWorker<Scalar>;

 public:
  BackwardPass(const BackwardProblem& x, const AttentionParams& params, const MaskRef& mask, Index workers)
      : x_(x),
        score_(params, mask, x),
        families_(x),
        sum_bytes_(HeadSums(nullptr, x).bytes()),
        tasks_(families_.count(), families_in_run(workers), Worker::strip_count(x), workers),
        strips_(Worker::strips(x)),
        workers_(workers) {
    worker_bytes_ = Worker::workspace_bytes(x.features, x.v.dim(), params);
    bias_bytes_ = SharedBiasSums<Scalar>(nullptr, x, families_).bytes();
    head_bytes_ = HeadMemory(nullptr, x, mask.passes()).bytes();
    owners_ = (tasks_.whole > 0 ? workers : 0) + tasks_.split;
  }

  Index workspace_bytes() const override {
    const Index of_worker = worker_bytes_ + bias_bytes_ + families_.members() * sum_bytes_;
    return workers_ * of_worker + owners_ * families_.members() * head_bytes_;
  }
  void use(std::byte* workspace) override {
    workspace_ = workspace;
    for (Index i = 0; i < owners_ * families_.members(); ++i) {
      const HeadMemory memory = head_memory(i);
      for (Index block = 0; block < blocks_in(x_.q.length()); ++block) new (memory.turns + block) Turn<int>();
      memory.totals.clear();
    }
    normalisers_.resize(static_cast<std::size_t>(owners_ * families_.members()));
  }

  Index preparations() const override { return tasks_.split; }
  void prepare(Index split) override {
    find_seen(families_[tasks_.whole_families + split], first_split_owner() + split);
  }

  Index tasks() const override { return tasks_.count(); }
  void run(Index task, int worker) override {
    Worker strip_worker(workspace_ + worker * worker_bytes_, x_, score_);
    const Index first = tasks_.family(task);
    if (!tasks_.is_whole(task)) {
      const HeadFamily family = families_[first];
      const Place place{task, worker, first_split_owner() + first - tasks_.whole_families, &family};
      run_strip(strip_worker, place, tasks_.strip(task));
      return in_order(task, [&] { add_strip(place, tasks_.strip(task)); });
    }
    const Index end = tasks_.end_of_run(task);
    for (Index index = first; index < end; ++index) {
      const HeadFamily family = families_[index];
      if (index + 1 < end) strip_worker.read_ahead(families_[index + 1].first());
      run_family(strip_worker, {task, worker, worker, &family});
    }
  }

 private:
  /// Who works on what: a family uses the memory of heads of its owner, which is its worker or, where its strips are
  /// tasks of their own, nobody else's.
  struct Place {
    Index task;
    int worker;
    Index owner;
    const HeadFamily* family;
  };

  /// What the strips of a head share.
  struct HeadMemory {
    HeadSums totals;
    Scratch scratch;
    KeyRange* seen;
    Scalar* delta;
    Turn<int>* turns;
    std::uint16_t* grad_q;

    HeadMemory(std::byte* start, const BackwardProblem& x, int passes) : totals(start, x), scratch(start) {
      scratch.take<std::byte>(totals.bytes());
      seen = scratch.take<KeyRange>(passes * blocks_in(x.q.length()));
      delta = scratch.take<Scalar>(x.q.length());
      turns = scratch.take<Turn<int>>(blocks_in(x.q.length()));
      const bool splits = RowSums<Scalar>::splits(x.grad_q.type);
      grad_q = splits ? scratch.take<std::uint16_t>(x.q.length() * x.q.dim()) : nullptr;
    }
    Index bytes() const { return scratch.bytes(); }
  };

  /// Runs are for short heads of their own, of which nothing is summed up that has to be added in order.
  Index families_in_run(Index workers) const {
    const bool alone = families_.members() == 1 && sum_bytes_ == 0 && Worker::strip_count(x_) == 1;
    return ReadAhead::serves(x_) && alone ? heads_in_run(families_.count(), workers) : 1;
  }
  /// All strips of a family.
  void run_family(Worker& strip_worker, const Place& place) {
    find_seen(*place.family, place.owner);
    for (Index strip = 0; strip < tasks_.strips; ++strip) {
      run_strip(strip_worker, place, strip);
      if (strip + 1 < tasks_.strips) add_strip(place, strip);
    }
    in_order(place.task, [&] { add_strip(place, tasks_.strips - 1); });
  }

  Index first_split_owner() const { return owners_ - tasks_.split; }
  std::byte* bias_start() const { return workspace_ + workers_ * worker_bytes_; }
  std::byte* sums_start() const { return bias_start() + workers_ * bias_bytes_; }
  std::byte* heads_start() const { return sums_start() + workers_ * families_.members() * sum_bytes_; }
  HeadMemory head_memory(Index slot) const {
    return HeadMemory(heads_start() + slot * head_bytes_, x_, score_.mask().passes());
  }
  Index slot(const Place& place, HeadIndex head) const {
    return place.owner * families_.members() + place.family->member(head);
  }
  HeadSums strip_sums(const Place& place, HeadIndex head) const {
    const Index member = place.worker * families_.members() + place.family->member(head);
    return HeadSums(sums_start() + member * sum_bytes_, x_);
  }
  SharedBiasSums<Scalar> bias_sums(const Place& place) const {
    return SharedBiasSums<Scalar>(bias_start() + place.worker * bias_bytes_, x_, families_);
  }

  /// Which keys the blocks of queries of a family see.
  void find_seen(const HeadFamily& family, Index owner) const {
    Index begin[kBlockSize], end[kBlockSize];
    family.for_each([&](HeadIndex head) {
      KeyRange* seen = head_memory(owner * families_.members() + family.member(head)).seen;
      for (int pass = 0; pass < score_.mask().passes(); ++pass) {
        for (Index block = 0; block < blocks_in(x_.q.length()); ++block) {
          const KeyRange queries = block_at(block, x_.q.length());
          score_.mask().pass(pass).ranges(head, queries, x_.k.length(), begin, end);
          *seen++ = hull_of(begin, end, queries.end - queries.begin, x_.k.length());
        }
      }
    });
  }

  void run_strip(Worker& worker, const Place& place, Index strip) {
    const HeadFamily& family = *place.family;
    const KeyRange keys = strips_.positions(strip);
    const SharedBiasSums<Scalar> bias = bias_sums(place);
    family.for_each([&](HeadIndex head) { strip_sums(place, head).clear(); });
    bias.clear();
    worker.run(family, strip, [&](HeadIndex head) {
      const HeadMemory memory = head_memory(slot(place, head));
      return BackwardHead<Scalar>{head,
                                  memory.seen,
                                  memory.delta,
                                  memory.grad_q,
                                  tasks_.is_whole(place.task) ? nullptr : memory.turns,
                                  normalisers_.data() + slot(place, head),
                                  strip_sums(place, head).tile_sums(bias.of_head(family, head, keys), keys.begin)};
    });
    bias.commit(family, keys);
  }

  /// Adds the sums of a strip to those of its head, and those of the last one's to the gradients.
  void add_strip(const Place& place, Index strip) const {
    place.family->for_each([&](HeadIndex head) {
      const HeadSums& totals = head_memory(slot(place, head)).totals;
      totals.add(strip_sums(place, head));
      if (strip + 1 < tasks_.strips) return;
      totals.commit(head);
      totals.clear();
    });
  }
  /// Sums are added in the order of tasks, by whatever worker: the same bits for any number of them.
  template <class F>
  void in_order(Index task, F&& f) {
    if (sum_bytes_ == 0) return;
    committed_.wait_for(task);
    f();
    committed_.end(task);
  }

  const BackwardProblem& x_;
  ScoreFunction<Scalar> score_;
  HeadFamilies families_;
  Index sum_bytes_;
  BackwardTasks tasks_;
  Strips<Scalar> strips_;
  Index workers_, owners_;
  Index worker_bytes_, bias_bytes_, head_bytes_;
  std::byte* workspace_ = nullptr;
  std::vector<Normalisers<Scalar>> normalisers_;  // of each head in memory
  Turn<Index> committed_;
};

}  // namespace headroom::inline v0::core::detail::inline HEADROOM_ISA
