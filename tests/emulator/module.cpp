// The emulator's settings and counters as a Python module.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator.h"

namespace py = pybind11;

// Local to the module, so that a process can load several builds.
PYBIND11_MODULE(_emulator, m) {
  py::enum_<emulator::Order>(m, "Order", py::module_local())
      .value("RANDOM", emulator::Order::kRandom)
      .value("FIRST", emulator::Order::kFirst)
      .value("LAST", emulator::Order::kLast);
  py::class_<emulator::Settings>(m, "Settings", py::module_local())
      .def_readwrite("seed", &emulator::Settings::seed)
      .def_readwrite("order", &emulator::Settings::order)
      .def_readwrite("multiprocessors", &emulator::Settings::multiprocessors)
      .def_readwrite("shared_bytes", &emulator::Settings::shared_bytes)
      .def_readwrite("count", &emulator::Settings::count)
      .def_readwrite("execute", &emulator::Settings::execute);
  py::class_<emulator::Counters>(m, "Counters", py::module_local())
      .def_readonly("launches", &emulator::Counters::launches)
      .def_readonly("launched_blocks", &emulator::Counters::launched_blocks)
      .def_readonly("blocks", &emulator::Counters::blocks)
      .def_readonly("barriers", &emulator::Counters::barriers)
      .def_readonly("products", &emulator::Counters::products)
      .def_readonly("global_loads", &emulator::Counters::global_loads)
      .def_readonly("global_stores", &emulator::Counters::global_stores)
      .def_readonly("global_requests", &emulator::Counters::global_requests)
      .def_readonly("global_sectors", &emulator::Counters::global_sectors)
      .def_readonly("shared_requests", &emulator::Counters::shared_requests)
      .def_readonly("shared_passes", &emulator::Counters::shared_passes)
      .def_readonly("split_sectors", &emulator::Counters::split_sectors)
      .def_readonly("bank_conflicts", &emulator::Counters::bank_conflicts)
      .def_readonly("kernels", &emulator::Counters::kernels);
  // References to the values in use.
  m.def("settings", &emulator::settings, py::return_value_policy::reference);
  m.def("counters", &emulator::counters, py::return_value_policy::reference);
  m.def("reset", [] {
    emulator::settings() = {};
    emulator::counters() = {};
  });
}
