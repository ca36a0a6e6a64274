// A client of a tta daemon: predictions and labels over ZeroMQ. The wire is described in ../README.md.
//
//     tta::Client client("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5556");
//     tta::Answer answer = client.predict(bytes, {n, height, width, 3}); // uint8, row-major, channels last
//     client.label(answer.ids(), {7, 3});
//
// Needs cppzmq and msgpack-cxx; C++17. One thread at a time.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <msgpack.hpp>
#include <zmq.hpp>
#include <zmq_addon.hpp>

namespace tta {

constexpr int kDeadlineExceeded = 4, kResourceExhausted = 8, kUnavailable = 14;

struct Error : std::runtime_error {
  int code;
  Error(int code, const std::string& what) : std::runtime_error(what), code(code) {}
};

struct Answer {
  int version = 0;
  std::uint64_t prediction_id = 0; // of the first image; the others follow by one
  std::size_t n = 0, k = 0;
  std::vector<float> logits; // n x k

  std::vector<std::uint64_t> ids() const {
    std::vector<std::uint64_t> found(n);
    for (std::size_t i = 0; i < n; ++i) found[i] = prediction_id + i;
    return found;
  }
};

class Client {
 public:
  Client(const std::string& endpoint, const std::string& control, double timeout_s = 10)
      : endpoint_(endpoint), control_(control), timeout_s_(timeout_s),
        server_(context_, zmq::socket_type::dealer), daemon_(context_, zmq::socket_type::dealer) {
    server_.set(zmq::sockopt::linger, 0);
    daemon_.set(zmq::sockopt::linger, 0);
    server_.connect(endpoint);
    daemon_.connect(control);
    std::random_device random; // whoever knows the name can read the answers
    for (int i = 0; i < 4; ++i) name_ += std::to_string(random());
  }

  // Classify images (n, height, width, channels).
  Answer predict(const std::vector<std::uint8_t>& images, const std::vector<int>& shape) {
    auto pack = [&](auto& out, std::uint64_t id) {
      out.pack_map(6);
      head(out, "predict", id);
      out.pack("dtype"); out.pack("uint8");
      out.pack("shape"); out.pack(shape);
      out.pack("client"); out.pack(name_); // sent again under its id, a request is computed once
    };
    std::vector<zmq::message_t> reply = ask(server_, endpoint_, pack, &images);
    auto unpacked = msgpack::unpack(reply[0].data<char>(), reply[0].size());
    auto fields = unpacked.get().as<std::map<std::string, msgpack::object>>();
    auto size = fields.at("shape").as<std::vector<std::size_t>>();
    Answer answer{fields.at("version").as<int>(), fields.at("prediction_id").as<std::uint64_t>(), size.at(0), size.at(1),
                  std::vector<float>(size.at(0) * size.at(1))};
    if (reply.size() != 2 || reply[1].size() != 4 * answer.logits.size()) throw Error(3, "no logits in the reply");
    std::memcpy(answer.logits.data(), reply[1].data(), reply[1].size());
    return answer;
  }

  // Say what images showed; the outcome of each label.
  std::vector<std::string> label(const std::vector<std::uint64_t>& prediction_ids, const std::vector<int>& labels) {
    auto pack = [&](auto& out, std::uint64_t id) {
      out.pack_map(5);
      head(out, "label", id);
      out.pack("prediction_ids"); out.pack(prediction_ids);
      out.pack("labels"); out.pack(labels);
    };
    std::vector<zmq::message_t> reply = ask(daemon_, control_, pack, nullptr);
    auto unpacked = msgpack::unpack(reply[0].data<char>(), reply[0].size());
    return unpacked.get().as<std::map<std::string, msgpack::object>>().at("outcomes").as<std::vector<std::string>>();
  }

 private:
  using Clock = std::chrono::steady_clock;

  static Clock::duration seconds(double s) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
  }

  template <class Packer>
  static void head(Packer& out, const char* op, std::uint64_t id) {
    out.pack("v"); out.pack(1);
    out.pack("op"); out.pack(op);
    out.pack("id"); out.pack(id);
  }

  // The reply to a request; asks again, under the same id, after silence and after a refusal that says when.
  template <class Pack>
  std::vector<zmq::message_t> ask(zmq::socket_t& socket, const std::string& where, Pack pack,
                                  const std::vector<std::uint8_t>* payload) {
    std::uint64_t id = ++last_id_;
    msgpack::sbuffer header;
    msgpack::packer<msgpack::sbuffer> packer(header);
    pack(packer, id);
    auto end = Clock::now() + seconds(timeout_s_);
    while (Clock::now() < end) {
      auto flags = payload ? zmq::send_flags::sndmore : zmq::send_flags::none;
      socket.send(zmq::buffer(header.data(), header.size()), flags);
      if (payload) socket.send(zmq::buffer(payload->data(), payload->size()), zmq::send_flags::none);
      auto until = std::min(end, Clock::now() + seconds(timeout_s_ / 4));
      while (Clock::now() < until) {
        zmq::pollitem_t ready[] = {{socket, 0, ZMQ_POLLIN, 0}};
        zmq::poll(ready, 1, std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()));
        if (!(ready[0].revents & ZMQ_POLLIN)) break;
        std::vector<zmq::message_t> reply;
        if (!zmq::recv_multipart(socket, std::back_inserter(reply))) break;
        auto unpacked = msgpack::unpack(reply[0].data<char>(), reply[0].size());
        auto fields = unpacked.get().as<std::map<std::string, msgpack::object>>();
        if (fields.at("id").as<std::uint64_t>() != id) continue; // of a request given up
        int code = fields.at("code").as<int>();
        if (code == 0) return reply;
        double later_s = fields.count("retry_after_s") ? fields.at("retry_after_s").as<double>() : 0.1;
        bool again = code == kResourceExhausted || code == kUnavailable;
        if (!again || Clock::now() + seconds(later_s) >= end)
          throw Error(code, fields.at("error").as<std::string>());
        std::this_thread::sleep_for(seconds(later_s));
        break;
      }
    }
    throw Error(kDeadlineExceeded, "no answer from " + where);
  }

  std::string endpoint_, control_, name_;
  double timeout_s_;
  zmq::context_t context_;
  zmq::socket_t server_, daemon_;
  std::uint64_t last_id_ = 0;
};

}  // namespace tta
