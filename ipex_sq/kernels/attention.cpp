// Attention in bf16, of many tokens or of one, and what puts it in the place of PyTorch's.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#ifdef __AVX512BF16__ // without, brgemm does not multiply bf16 either

#include "prompt_attention.h"
#include "softmax.h"
#include "step_attention.h"

namespace {

using namespace ipex_sq;

// [batch, heads, tokens, size] with the last dimension dense and pairs that can be read as words.
at::Tensor readable(const at::Tensor& x) {
  const auto strides = x.strides();
  const bool even = std::all_of(strides.begin(), strides.end() - 1, [](int64_t s) { return s % 2 == 0; });
  return strides.back() == 1 && even ? x : x.contiguous();
}

// `short_attention`, where oneDNN is switched off. The logarithm of the sums counts as the largest score.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_by_pytorch(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const std::optional<at::Tensor>& mask,
    bool causal,
    double scale) {
  const int64_t share = query.size(1) / key.size(1);
  std::optional<at::Tensor> added;
  if (mask) added = mask->to(at::kFloat).expand({query.size(0), query.size(1), query.size(2), key.size(2)});
  const auto [output, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      query, key.repeat_interleave(share, 1), value.repeat_interleave(share, 1), 0.0, causal, added, scale);
  const at::Tensor dense = sums.contiguous();
  return {output.transpose(1, 2).contiguous().transpose(1, 2), dense, at::ones_like(dense)};
}

// query [batch, heads, tokens, size], key and value [batch, groups, keys, size] bf16, size even;
// mask [batch or 1, heads or 1, tokens or 1, keys or 1] is added to the scaled scores, scale > 0.
// Returns [batch, heads, tokens, size], in memory with heads inside tokens, and of the scores of
// each row [batch, heads, tokens] fp32 the largest and the sum of exp(score - largest).
std::tuple<at::Tensor, at::Tensor, at::Tensor> short_attention(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const std::optional<at::Tensor>& mask,
    bool causal,
    double scale) {
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "queries, keys and values have four dimensions");
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2), size = query.size(3);
  TORCH_CHECK(size % 2 == 0 && scale > 0, "an even size and a positive scale are needed");
  TORCH_CHECK(key.sizes() == value.sizes() && key.size(3) == size && key.size(0) == batch && key.size(1) > 0 &&
                  heads % key.size(1) == 0,
              "keys, values and queries do not fit together");
  for (const auto* x : {&query, &key, &value}) TORCH_CHECK(x->scalar_type() == at::kBFloat16, "bf16 is needed");
  if (!at::globalContext().userEnabledMkldnn() && query.numel() > 0 && key.numel() > 0) {
    return attention_by_pytorch(query, key, value, mask, causal, scale);
  }
  const at::Tensor q = readable(query), k = readable(key), v = readable(value);
  auto output = at::empty({batch, tokens, heads, size}, query.options());
  auto largest = at::empty({batch, heads, tokens}, query.options().dtype(at::kFloat));
  auto sums = at::empty_like(largest);
  const Bias bias(mask, {batch, heads, tokens, key.size(2)});
  if (query.numel() == 0 || key.numel() == 0) { // as PyTorch has it
    return {output.zero_().transpose(1, 2), largest.fill_(-std::numeric_limits<float>::infinity()), sums.zero_()};
  }
  const float factor = static_cast<float>(scale);
  BFloat16* to = output.mutable_data_ptr<BFloat16>();
  float* tops = largest.mutable_data_ptr<float>();
  float* totals = sums.mutable_data_ptr<float>();
  if (tokens == 1) {
    // The one token sees the first key alone if it is to see those up to its own place.
    const int64_t keys = causal ? std::min<int64_t>(1, k.size(2)) : k.size(2);
    StepAttention{q, k, v, bias, keys, factor, to, tops, totals}.run();
  } else {
    PromptAttention{q, k, v, bias, causal, factor, to, tops, totals}.run();
  }
  return {output.transpose(1, 2), largest, sums};
}

// A mode of PyTorch's dispatcher that nothing in PyTorch uses: of an extension that is no more.
constexpr auto kMode = c10::DispatchKey::DeferredInit;

thread_local int64_t most_tokens = 0;

// Whether it is a tensor of the CPU and nothing else: neither without data, nor a wrapper or a subclass.
bool is_plain(const at::Tensor& x) {
  constexpr c10::DispatchKeySet kPlain(
      {c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  return x.is_cpu() && (x.key_set() - kPlain).highestFunctionalityKey() == c10::DispatchKey::Undefined;
}

bool needs_gradients(const at::Tensor& x) {
  return c10::GradMode::is_enabled() && x.requires_grad();
}

// From now on this thread's attention of up to `most` tokens is `short_attention`, without its models'
// code being changed; 0 ends it. It has no gradients.
void replace_attention(int64_t most) {
  most_tokens = most;
  c10::impl::tls_set_dispatch_key_included(kMode, most > 0);
}

// In the place of PyTorch's operator of that name, in the mode.
std::tuple<at::Tensor, at::Tensor> attention_in_mode(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    double dropout_p,
    bool causal,
    const std::optional<at::Tensor>& mask,
    std::optional<double> scale) {
  const c10::impl::ExcludeDispatchKeyGuard outside(kMode);
  const int64_t size = query.size(3);
  const double factor = scale.value_or(1 / std::sqrt(static_cast<double>(size)));
  const bool few = query.size(2) == 1 || std::max(query.size(2), key.size(2)) <= most_tokens;
  const bool suits = query.scalar_type() == at::kBFloat16 && dropout_p == 0 && size % 2 == 0 && factor > 0;
  // A mode in Python, as that of fake tensors, is to see PyTorch's operator.
  bool plain = !c10::impl::dispatch_mode_enabled() && (!mask || is_plain(*mask));
  for (const auto* x : {&query, &key, &value}) plain = plain && is_plain(*x) && !needs_gradients(*x);
  if (!few || !suits || !plain || !at::globalContext().userEnabledMkldnn()) {
    return at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, causal, mask, scale);
  }
  std::optional<at::Tensor> added = mask;
  while (added && added->dim() < 4) added = added->unsqueeze(0);
  const auto [output, largest, sums] = short_attention(query, key, value, added, causal, factor);
  return {output, largest + sums.log()};
}

} // namespace

TORCH_LIBRARY_IMPL(_, DeferredInit, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, DeferredInit, library) {
  library.impl("_scaled_dot_product_flash_attention_for_cpu", attention_in_mode);
}

#endif

TORCH_LIBRARY_FRAGMENT(ipex_sq, library) {
  library.def(
      "short_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, "
      "float scale) -> (Tensor, Tensor, Tensor)");
#ifdef __AVX512BF16__
  library.impl("short_attention", torch::dispatch(c10::DispatchKey::CPU, short_attention));
  library.def("replace_attention(int most_tokens) -> ()", replace_attention);
#endif
}
