# cmake -DNM=nm -DISA=avx2 -DOBJECT=kernels.cc.o -P one_definition.cmake
# Fails when the object defines a symbol that other objects could share (weak or global) outside fastrnn::<isa>.

execute_process(COMMAND ${NM} --demangle --defined-only --extern-only ${OBJECT} OUTPUT_VARIABLE symbols
                COMMAND_ERROR_IS_FATAL ANY)
string(REGEX REPLACE "\n+" ";" symbols "${symbols}")
set(seen 0)
set(wrong)
foreach(line IN LISTS symbols)
  if(line MATCHES "^[0-9a-f]* *[A-Za-z] (.*)$")
    set(name "${CMAKE_MATCH_1}")
    math(EXPR seen "${seen} + 1")
    if(NOT name MATCHES "fastrnn::${ISA}::" AND NOT name MATCHES "^DW\\.ref\\.")
      string(APPEND wrong "\n  ${line}")
    endif()
  endif()
endforeach()
if(wrong)
  message(FATAL_ERROR "kernels.cc for ${ISA} defines symbols outside fastrnn::${ISA}:${wrong}")
elseif(seen EQUAL 0)
  message(FATAL_ERROR "${OBJECT} defines nothing: is the check reading the right file?")
endif()
message(STATUS "${seen} symbols, all in fastrnn::${ISA}")
