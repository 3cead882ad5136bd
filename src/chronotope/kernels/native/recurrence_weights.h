// What decays leave inside a chunk. Every weight is a product of exp(decay), or exp of a sum of decays: nothing is ever
// divided, so that nothing overflows, and no difference of sums loses a weak decay beside strong ones.
#pragma once

#include "recurrence.h"

namespace chronotope {

enum Form { NEVER, BY_TOKEN, BY_CHANNEL };

// `width` numbers for each token or strip: 1, or by channel `key`.
struct Weights {
  Form form;
  int64_t width;
  float *kept;             // [tokens][width]: exp(decay)
  float *across, *before;  // [strips][width]: what is left over a strip; from the start of the chunk to a strip
  float *over;             // [width]: over the chunk
  // [tokens][width]: over a strip's tokens up to this one; over those after it; the same of the chunk's. By channel
  // only after `spread`.
  float *since, *until, *since_start, *until_end;
  float *reach;  // by token, [strips][tokens]: from each earlier token to the start of a strip

  Factor grown() const { return factor(since_start); }
  Factor rest() const { return factor(until_end); }
  Factor factor(const float* at) const { return {form == NEVER ? nullptr : at, form == BY_CHANNEL ? width : 0}; }
  float left(int64_t channel) const { return form == NEVER ? 1.0f : over[form == BY_CHANNEL ? channel : 0]; }

  void set(const Recurrence& r, const Sizes& s, const Place& at) {
    form = r.decay.data == nullptr ? NEVER : r.decay.channels > 1 ? BY_CHANNEL : BY_TOKEN;
    width = form == BY_CHANNEL ? s.key : 1;
    if (form == NEVER) return;
    const int64_t tokens = s.tokens * width, strips = round_up(s.strips * width, VEC), once = round_up(width, VEC);
    float* x = memory_.take(5 * tokens + 2 * strips + once + (form == BY_TOKEN ? s.strips * s.tokens : 0));
    for (float** y : {&kept, &since, &until, &since_start, &until_end}) *y = x, x += tokens;
    for (float** y : {&across, &before}) *y = x, x += strips;
    over = x, reach = x + once;
    form == BY_CHANNEL ? set_channels(r, s, at) : set_tokens(r, s, at);
  }

  // By channel: what else a backward pass reads.
  void spread(const Sizes& s) {
    if (form != BY_CHANNEL) return;
    for (int64_t c = 0; c < width; c += VEC) {
      vec after = all(1.0f);
      for (int64_t strip = s.strips - 1; strip >= 0; --strip) {
        spread_strip(strip * STRIP * width + c, load(before + strip * width + c), after);
        after *= load(across + strip * width + c);
      }
    }
  }

 private:
  Scratch memory_;

  void spread_strip(int64_t first, vec before_strip, vec after_strip) {
    vec left = all(1.0f);
    for (int64_t i = first; i < first + STRIP * width; i += width) {
      left *= load(kept + i);
      store(since + i, left), store(since_start + i, before_strip * left);
    }
    left = all(1.0f);
    for (int64_t i = first + (STRIP - 1) * width; i >= first; i -= width) {
      store(until + i, left), store(until_end + i, after_strip * left);
      left *= load(kept + i);
    }
  }

  // Decays of a token, with zeros beyond the last channel and the last token.
  const float* decays(const Recurrence& r, const Place& at, int64_t i) {
    const float* found = i < at.count ? r.decay.at(at.batch, at.head, at.from + i) : nullptr;
    if (found != nullptr && r.decay.channels == width) return found;
    float* padded = kept + i * width;
    std::fill(padded, padded + width, 0.0f);
    if (found != nullptr) std::copy_n(found, r.decay.channels, padded);
    return padded;
  }

  // `across` is exp of a sum, so that weak decays do not add up one rounding of exp(decay) for each token.
  void set_channels(const Recurrence& r, const Sizes& s, const Place& at) {
    for (int64_t strip = 0; strip < s.strips; ++strip) {
      const float* rows[STRIP];
      for (int i = 0; i < STRIP; ++i) rows[i] = decays(r, at, strip * STRIP + i);
      float *own = kept + strip * STRIP * width, *sums = across + strip * width;
      for (int64_t c = 0; c < width; c += VEC) {
        vec sum = {};
        for (int i = 0; i < STRIP; ++i) {
          const vec decay = load(rows[i] + c);
          sum += decay;
          store(own + i * width + c, exp(decay));
        }
        store(sums + c, sum);
      }
    }
    for (int64_t c = 0; c < width; c += VEC) {
      vec sum = {}, left = all(1.0f);
      for (int64_t at = c; at < s.strips * width; at += width) {
        sum += load(across + at);
        store(across + at, exp(load(across + at)));
        store(before + at, left);
        left *= load(across + at);
      }
      store(over + c, exp(sum));
    }
  }

  void set_tokens(const Recurrence& r, const Sizes& s, const Place& at) {
    float total = 0;
    for (int64_t strip = 0; strip < s.strips; ++strip) {
      float sum = 0;
      for (int64_t i = strip * STRIP; i < (strip + 1) * STRIP; ++i) {
        kept[i] = i < at.count ? *r.decay.at(at.batch, at.head, at.from + i) : 0.0f;
        sum += kept[i];
      }
      across[strip] = sum, total += sum;
    }
    for (int64_t i = 0; i < s.tokens; i += VEC) store(kept + i, exp(load(kept + i)));
    for (int64_t i = 0; i < s.strips; i += VEC) store(across + i, exp(load(across + i)));
    *over = exp(all(total))[0];
    float left = 1.0f;
    for (int64_t strip = 0; strip < s.strips; left *= across[strip++]) before[strip] = left;
    left = 1.0f;
    for (int64_t strip = s.strips - 1; strip >= 0; left *= across[strip--]) {
      const int64_t first = strip * STRIP, last = first + STRIP - 1;
      float own = 1.0f;
      for (int64_t i = first; i <= last; ++i) since[i] = own *= kept[i], since_start[i] = before[strip] * own;
      own = 1.0f;
      for (int64_t i = last; i >= first; own *= kept[i--]) until[i] = own, until_end[i] = left * own;
    }
    set_reach(s);
  }

  void set_reach(const Sizes& s) {
    std::fill(reach, reach + s.tokens, 0.0f);
    for (int64_t strip = 1; strip < s.strips; ++strip) {
      float* now = reach + strip * s.tokens;
      const int64_t first = strip * STRIP, left = first - STRIP;
      for (int64_t j = 0; j < left; ++j) now[j] = across[strip - 1] * now[j - s.tokens];
      std::copy_n(until + left, STRIP, now + left);
      std::fill(now + first, now + s.tokens, 0.0f);
    }
  }
};

}  // namespace chronotope
