// Classifies raw images and labels them: classify ENDPOINT CONTROL HEIGHT WIDTH CHANNELS LABEL... < images
//
//     g++ -std=c++17 -DMSGPACK_NO_BOOST classify.cpp -lzmq -o classify
#include <iostream>

#include "tta.hpp"

int main(int argc, char** argv) {
  if (argc < 7) {
    std::cerr << "usage: classify ENDPOINT CONTROL HEIGHT WIDTH CHANNELS LABEL... < images\n";
    return 2;
  }
  std::vector<int> numbers;
  for (int i = 3; i < argc; ++i) numbers.push_back(std::stoi(argv[i]));
  std::vector<int> labels(numbers.begin() + 3, numbers.end());
  std::vector<std::uint8_t> images{std::istreambuf_iterator<char>(std::cin), {}};
  try {
    tta::Client client(argv[1], argv[2]);
    tta::Answer answer = client.predict(images, {int(labels.size()), numbers[0], numbers[1], numbers[2]});
    std::vector<std::string> outcomes = client.label(answer.ids(), labels);
    for (std::size_t i = 0; i < answer.n; ++i) {
      auto row = answer.logits.begin() + i * answer.k;
      std::cout << answer.ids()[i] << " " << answer.version << " " << std::max_element(row, row + answer.k) - row << " "
                << outcomes[i] << "\n";
    }
  } catch (const tta::Error& error) {
    std::cerr << "classify: " << error.what() << " (code " << error.code << ")\n";
    return 1;
  }
}
